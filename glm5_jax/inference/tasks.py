"""Running lm-eval's tasks."""

import contextlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from glm5_jax.errors import InputError
from glm5_jax.inference.evaluate import Scorer
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.harness import Glm5Lm


def check_tasks(tasks: Sequence[str]) -> TaskManager:
    """Finds lm-eval's tasks.

    Raises:
      InputError: a name is neither that of a task, group or tag nor a YAML file.
    """
    manager = TaskManager()
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise InputError(
                f"--tasks: {name!r:.80} is none, expected a YAML file or what `lm-eval ls tasks` "
                "lists"
            )
    return manager


def run_tasks(
    lm: Glm5Lm,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """Runs tasks; returns lm-eval's results, as JSON has them, without the single answers.

    Args:
      num_fewshot: examples before each question; as each task says unless given.
      limit: questions of each task, the first; all unless given.
      apply_chat_template: whether questions and examples are turns of a conversation.

    Raises:
      InputError: lm-eval cannot run them.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval reports there
            found = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                log_samples=False,
                task_manager=manager,
            )
    except InputError:
        raise
    except Exception as error:  # tasks are programs of others
        if _is_of_model(error):
            raise
        name = ",".join(tasks)
        raise InputError(f"--tasks {name:.80}: {type(error).__name__}: {error!s:.300}") from None
    results: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return results


def _is_of_model(error: Exception) -> bool:
    """Whether it was raised while scoring or generating, which is no task's doing."""
    modules = {Scorer.__module__, Generator.__module__}
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") in modules for frame, _ in frames)


def tables(results: dict[str, Any]) -> str:
    """The results in words."""
    columns = [column for column in ("results", "groups") if results.get(column)]
    return "\n".join(make_table(results, column) for column in columns)
