"""Bugs that other implementations of GLM-5 have had, put into this one: every one must fail a test.

Run by hand, `make mutants`; each mutant lives in a copy of the project.
"""

from pathlib import Path

from tests.mutants import of_model, of_programs

ROOT = Path(__file__).parent.parent.parent
MUTANTS = [*of_model.MUTANTS, *of_programs.MUTANTS]
