"""The section `model.tuner`: small trainable parts in a frozen pretrained backbone."""

import inspect
from typing import Any

from pydantic import ConfigDict, model_validator

from forgetcast.checks import require_choice
from forgetcast.runs.options import check_arguments
from forgetcast.runs.section import Section
from forgetcast.tuners.registry import TUNERS, tuner_class


class TunerChoice(Section):
    """A tuner by its name; every other key is an option of its constructor.

    Attributes:
        kind: one of `forgetcast.tuners.registry.TUNERS`.
    """

    model_config = ConfigDict(extra="allow")

    kind: str

    @model_validator(mode="after")
    def _possible(self) -> "TunerChoice":
        require_choice("model.tuner.kind", self.kind, TUNERS)
        parameters = inspect.signature(tuner_class(self.kind)).parameters
        check_arguments("model.tuner", self.kind, parameters, self.model_extra or {})
        self.made()
        return self

    def made(self) -> Any:
        """The tuner, ready to be attached.

        Raises:
            ValueError: what the tuner refuses.
        """
        given = (self.model_extra or {}).items()
        return tuner_class(self.kind)(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in given}
        )
