"""What all sections of a recipe share."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from forgetcast.checks import complaint

Share = Annotated[float, Field(ge=0, le=0.9)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """No unknown key, no value of another type, no change afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def refuse_set(self, section: str, keys: Sequence[str], reason: str) -> None:
        """Raise if one of `keys` differs from its default; `reason` says why nothing reads it."""
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise complaint(
                    f"got {section}.{key}={plain(getattr(self, key))!r}",
                    f"no {key}, because {reason}",
                    f"Leave {section}.{key} out.",
                )

    def require_set(self, section: str, keys: Sequence[str], reason: str) -> None:
        """Raise if one of `keys` is missing; `reason` says what needs it."""
        for key in keys:
            if getattr(self, key) is None:
                raise complaint(f"no {section}.{key}", f"a value, because {reason}", f"Add {section}.{key}.")


def plain(value: object) -> object:
    """A value as a recipe says it."""
    return value.model_dump(mode="json") if isinstance(value, Section) else value
