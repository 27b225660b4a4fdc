"""Bugs that other implementations of GLM-5 have had, put into this one: every one must fail a test.

Run by hand, `make mutants`; each mutant lives in a copy of the project.
"""

from tests.mutants import of_model, of_programs

MUTANTS = [*of_model.MUTANTS, *of_programs.MUTANTS]
