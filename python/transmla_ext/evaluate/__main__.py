"""lm-evaluation-harness's own command line, which knows the model "transmla" when it is started here."""

from lm_eval.__main__ import cli_evaluate

from . import harness  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
