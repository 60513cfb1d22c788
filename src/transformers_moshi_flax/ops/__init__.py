"""The mathematics of the models, without parameters: every function is a few plain lines, its definition.

Above this package nothing speaks of a platform. Where XLA's CPU backend wants something else than the definition,
``cpu.py`` has a twin, which :func:`~.dispatch.for_cpu` chooses when a program is lowered; tests hold each twin equal
to its definition. What an accelerator runs is the definition.
"""
