"""The frozen base class of every config, and the rules of a whole tree.

Problems are found in two stages. *Construction* of a node checks what the node's own fields say: types, unknown and
missing keys, `Field(gt=0)`, Literals; it raises one `ConfigError` with everything wrong in that node. *Rules* that
compare values (`Config.problems`) never stop construction: `check_tree` collects them over the finished tree, so that
one report names them all. Nothing derived is stored: derive it in a property.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlt.config.fields import refuse
from mlt.config.problems import ConfigError, Problem
from mlt.config.validation import problems_of


class FrozenMap(Mapping[str, Any]):
    """A read-only, hashable mapping: what a `Mapping[str, X]` field holds. Order is kept but does not count."""

    def __init__(self, items: Mapping[str, Any]):
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class _ConfigMeta(type(BaseModel)):
    """Tells type checkers that every config class is frozen, and so hashable."""


class Config(BaseModel, metaclass=_ConfigMeta):
    """A node of the config tree: frozen, hashable, keyword-only, strictly typed, without unknown keys.

    Types are strict: a string is never read as a number and a bool is no int; an int is taken for a float, a list for
    a tuple. NaN and infinity are refused unless the field says `Field(allow_inf_nan=True)`. A field may have the types
    listed in `mlt.config.fields`; one annotated with a config class takes any subclass of it. A class that only serves
    as such a base should be abstract (`abc.ABC` with abstract methods): then plain data must name a subclass.

    Raises:
        ConfigError: with every problem of this node's own fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    def __init__(self, **data: Any):
        try:
            super().__init__(**{name: freeze(value) for name, value in data.items()})
        except ValidationError as error:
            raise ConfigError(problems_of(error, type(self)), f"{type(self).__name__}(...)") from None
        for name in type(self).model_fields:
            object.__setattr__(self, name, freeze(getattr(self, name)))  # pydantic hands out plain dicts

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.__pydantic_complete__:
            return
        for name, field in cls.model_fields.items():
            reason = "a field may have no alias" if field.alias else refuse(field.annotation)
            if reason:
                raise TypeError(f"{cls.__name__}.{name}: {reason}")

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, name) for name in type(self).model_fields)))

    def problems(self) -> Iterable[Problem]:
        """Broken rules of this node, with paths relative to it; children state their own.

        Override it as a generator: `yield Problem("num_kv_heads", 3, "must divide num_heads = 8", "use 1, 2 or 4")`.
        Fields are of the declared types by then, but other rules may be broken too.
        """
        return ()

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like any construction."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """`replace`: pydantic's own copy would take the update unchecked. Frozen children need no deep copy."""
        return self.replace(**(update or {}))


def freeze(value: Any) -> Any:
    """Lists as tuples, mappings as FrozenMaps, and float and str subclasses (NumPy's, say) as the plain types."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping):
        return FrozenMap({key: freeze(item) for key, item in value.items()})
    if isinstance(value, float):
        return float(value)
    return str.__str__(value) if isinstance(value, str) else value
