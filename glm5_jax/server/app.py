"""The routes of the server, and what holds for all of them."""

import asyncio
import base64
import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5_jax.server.body import parsed, read_body
from glm5_jax.server.chat import chat
from glm5_jax.server.completions import complete
from glm5_jax.server.errors import GONE, ApiError, draining, failed
from glm5_jax.server.protocol import Body, ChatBody, CompletionBody
from glm5_jax.server.service import Service

Asked = TypeVar("Asked", bound=Body)


def build_app(service: Service, on_failure: Callable[[], None]) -> FastAPI:
    """The application; the function is called if the engine fails."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start(on_failure)
        yield
        await service.worker.stop()

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="glm5", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(_api(service))
    app.include_router(_pages(service))
    app.add_middleware(_Gate, service=service)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_defect)
    return app


def _api(service: Service) -> APIRouter:
    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        key = service.key
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong, expected the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    router = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])
    began = int(time.time())
    model = {"id": service.name, "object": "model", "created": began, "owned_by": "glm5"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The models that are served: one."""
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}")
    async def model_of(name: str) -> dict[str, Any]:
        """The model of a name."""
        _check_model(service, name)
        return model

    def body_of(kind: type[Asked]) -> Callable[[Request], Awaitable[Asked]]:
        async def read(request: Request) -> Asked:
            data = await read_body(request, service.limits.body_bytes)
            body = await asyncio.to_thread(parsed, kind, data)  # large ones take a while
            _check_model(service, body.model)
            return body

        return read

    @router.post("/completions", **_documented(CompletionBody))
    async def completions(
        request: Request, body: Annotated[CompletionBody, Depends(body_of(CompletionBody))]
    ) -> Response:
        """Continues prompts."""
        return await complete(request, service, body)

    @router.post("/chat/completions", **_documented(ChatBody))
    async def chat_completions(
        request: Request, body: Annotated[ChatBody, Depends(body_of(ChatBody))]
    ) -> Response:
        """Continues a conversation."""
        return await chat(request, service, body)

    return router


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"the model {name!r:.80} is not served, expected {service.name!r}",
            code="model_not_found",
            param="model",
        )


def _documented(body: type[Body]) -> dict[str, Any]:
    """What `/openapi.json` says of a body that is read by our own rules."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _pages(service: Service) -> APIRouter:
    router = APIRouter()
    page = (Path(__file__).parent / "chat.html").read_text(encoding="utf-8")
    policy = _content_policy(page)

    @router.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @router.get("/health")
    async def health() -> Response:
        """Whether requests are taken."""
        if service.worker.failure is not None:
            raise failed(503)
        if service.worker.draining:
            raise draining()
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return PlainTextResponse(service.metrics.text())

    return router


def _content_policy(page: str) -> str:
    """Lets a page run what stands in it, speak to this server, and nothing else."""

    def hashes(tag: str) -> str:
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    known = ApiError(error.status_code, f"{request.method} {path:.80}: {error.detail}")
    return JSONResponse(known.body(), error.status_code, error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _answer_defect(request: Request, error: Exception) -> Response:
    return await _answer_error(request, ApiError(500, "the server failed", code="internal_error"))


class _Gate:
    """Refuses names that the server does not go by, and counts what is answered."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._knows_host(scope):
                await self._app(scope, receive, watch)
            else:
                error = ApiError(403, "the header Host names a host that this server is not")
                response = JSONResponse(error.body(), error.status)
                await response(scope, receive, watch)
        finally:
            route = scope.get("route")
            path = "other" if route is None else route.path
            self._service.metrics.requests.labels(path, str(status)).inc()

    def _knows_host(self, scope: Scope) -> bool:
        """Whether a page of somebody else has not made its own name mean this machine."""
        hosts = self._service.hosts
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        return hosts is None or re.sub(r":\d+$", "", given).strip("[]").lower() in hosts
