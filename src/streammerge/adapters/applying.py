"""A base with adapters: an index whose tensors are expressions over those of the base and of the adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from streammerge.adapters.experts import Block, Singles, block_of, blocks, fused_update, separate_updates
from streammerge.adapters.modules import Adapter, Module, read_adapter
from streammerge.adapters.names import Names, Spot, wanted_names
from streammerge.adapters.updates import updated
from streammerge.checkpoints.heads import HEADS, is_embedding, is_head, tied_embedding
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import MismatchError, RecipeError, printable
from streammerge.sources.base import Source
from streammerge.sources.elementwise import rounded
from streammerge.sources.joined import joined
from streammerge.sources.rows import rows_of
from streammerge.tensors.dtypes import DType
from streammerge.tensors.layers import layer_of
from streammerge.units import counted, inflected

__all__ = ["adapted", "read_adapter"]

_ORDER = ("saved", "ia3", "full", "lora", "embedding", "experts", "loha", "lokr", "glora", "bias", "tokens")
"""What is replaced comes before what is added to it; trained rows come last."""


def adapted(base: CheckpointIndex, adapters: Sequence[tuple[Adapter, float]], text: str = "") -> CheckpointIndex:
    """Returns the index of a base with adapters, each with its strength, added in their order. No tensor is read.

    The dtypes stay those of the base, and each number is rounded once. ``text``: what a recipe calls it.

    Raises MismatchError, which names it, for a tensor
    of an adapter that has no place in the base or does not fit there.
    """
    made = _Adapted(base, base)
    for adapter, strength in adapters:
        made.add(adapter, strength)
    return made.index([adapter for adapter, _ in adapters], text)


@dataclass(slots=True)
class _Adapted:
    """``base``: with a head of its own where an adapter unties it from ``plain``. ``now``: name -> the changed tensor, not
    rounded yet."""

    plain: CheckpointIndex
    base: CheckpointIndex
    now: dict[str, Source] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, adapter: Adapter, strength: float) -> None:
        self._untie(adapter)
        names = Names(self.base)
        experts = blocks(self.base.entries)
        singles: dict[str, Singles] = {}
        lost: list[Module] = []
        touched = set[str]()
        for module in sorted(adapter.modules, key=lambda module: _ORDER.index(module.kind)):
            options = [module, *module.others]
            failures: list[MismatchError] = []
            for option in options:
                try:
                    spot = self._find(adapter, option, names)
                    if spot is not None:
                        self._apply(adapter, option, spot, strength)
                        touched.add(spot.name)
                        break
                    if module.kind == "ia3" and module.parameter == "bias":  # a module without a bias
                        break
                    pieces = names.pieces(wanted_names(option))
                    if pieces:
                        self._in_pieces(adapter, option, pieces, strength)
                        touched.update(piece.name for piece in pieces)
                        break
                    found = block_of(option, experts)
                    if found is None:
                        continue
                    block, place = found
                    names.learn(f"{place}.", f"{block.place}.")
                    self._experts(adapter, option, block, singles, strength)
                    touched.update(block.names.values())
                    break
                except MismatchError as error:
                    failures.append(error)
            else:
                if failures:
                    raise failures[0]
                lost.append(module)
        for layer in singles.values():
            change = partial(self._fuse, layer, strength)
            self._guarded(adapter, next(iter(layer.modules.values())), layer.block.place, change)
        self._lost(adapter, lost, names, strength, touched)
        self._check_promises(adapter, touched)
        self.notes += [*adapter.notes, *dict.fromkeys(names.notes)]
        scale = "" if strength == 1.0 else f", times {strength:g}"
        self.notes.append(
            f"{printable(self.base.path)}: {len(touched)} of its {counted(len(self.base.entries), 'tensor')} "
            f"{inflected(len(touched), 'is', 'are')} changed by the adapter {adapter.where} ({adapter.dialect}{scale})"
        )

    def _untie(self, adapter: Adapter) -> None:
        """Gives the base a head of its own, if it is tied to embeddings, and PEFT trained the one without the other.

        A whole module (modules_to_save) is a copy that PEFT trains in place of the base's, which stays as it was. PEFT
        saves both also where the vocabulary was resized, but without training them they stay one tensor.
        """
        config = adapter.config
        own = tied_embedding(self.base) if config is not None and config.saved and not config.ties else None
        if config is None or own is None:
            return
        heads = [each.name for each in adapter.modules if each.kind == "saved" and is_head(each.name)]
        head = next((name for name, first in self.base.aliases.items() if first == own and is_head(name)), None)
        head = head or (heads or HEADS)[0]
        if not {own.split(".")[-2], head.split(".")[-2]}.intersection(each.rpartition(".")[2] for each in config.saved):
            return
        if head in self.base.entries and head not in self.base.aliases:
            return
        entries = {**self.base.entries, head: self.base.entries[own].named(head)}
        aliases = {name: first for name, first in self.base.aliases.items() if name != head}
        self.base = replace(self.base, entries=entries, aliases=aliases)
        if own in self.now:
            self.now[head] = self.now[own].named(head)
        self.notes.append(
            f"{adapter.where} has trained {printable(own)} and {printable(head)} apart (modules_to_save), so the head is a "
            "tensor of its own"
        )

    def _is_new(self, adapter: Adapter, module: Module) -> bool:
        """Whether a module that the base lacks is a new head: PEFT trains it whole, and its configuration lists it."""
        config = adapter.config
        saved = config.saved if config is not None else ()
        return module.kind == "saved" and any(f".{each}." in f".{module.name}." for each in saved)

    def _add_whole(self, module: Module) -> str:
        """Adds a whole tensor that the base lacks, in the dtype that most tensors of the base have. Returns its name."""
        name, value = wanted_names(module)[0], module.parts["value"]
        dtypes = Counter(each.spec.dtype for each in self.base.entries.values() if each.spec.dtype.kind == "float")
        dtype = dtypes.most_common(1)[0][0] if dtypes and value.spec.dtype.kind == "float" else value.spec.dtype
        self.base = replace(self.base, entries={**self.base.entries, name: rounded(value, dtype).named(name)})
        return name

    def _lost(self, adapter: Adapter, lost: list[Module], names: Names, strength: float, touched: set[str]) -> None:
        """Places modules again, since other modules may have told how the base calls theirs. Raises MismatchError if a
        module has no place."""
        added = list[str]()
        for module in lost:
            spot = self._find(adapter, module, names)
            if spot is None and touched and self._is_new(adapter, module):
                added.append(self._add_whole(module))
                continue
            if spot is None and module.kind == "bias":
                weight = self._find(adapter, replace(module, parameter="weight"), names)
                if weight is not None:
                    raise MismatchError(
                        f"{adapter.where}: {printable(module.keys[0])} is added to a bias, and {printable(weight.name)} of "
                        f"{printable(self.base.path)} has none, so no weights hold the sum; train without lora_bias, or "
                        "load base and adapter without merging them"
                    )
            if spot is None:
                others = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
                wanted = wanted_names(module)[0]
                raise MismatchError(
                    f"{adapter.where}: {printable(module.keys[0])}{others} has no tensor {printable(wanted)} in "
                    f"{printable(self.base.path)}{names.near(wanted)}; give the base that the adapter was made for"
                )
            self._apply(adapter, module, spot, strength)
        if added:
            shapes = ", ".join(f"{printable(name)} {list(self.base.entries[name].spec.shape)}" for name in added)
            task = f" ({printable(adapter.config.task)})" if adapter.config and adapter.config.task else ""
            self.warnings.append(
                f"{adapter.where} brings {shapes}, which {printable(self.plain.path)} lacks, so the output has it too; the "
                f"configuration does not tell of it: load it with the class and the number of labels of the training{task}"
            )

    def _check_promises(self, adapter: Adapter, touched: set[str]) -> None:
        """Raises MismatchError if the configuration names whole modules or rows that the adapter does not have."""
        config = adapter.config
        if config is None:
            return
        whole = {part for each in adapter.modules if each.kind == "saved" for part in each.name.split(".")}
        for name in config.saved:
            if name not in whole and any(name in each.split(".") for each in self.base.entries):
                raise MismatchError(
                    f"{adapter.where}: modules_to_save names {printable(name)}, and the adapter has no tensor of it; the "
                    "adapter is not complete"
                )
        stacks = {layer.stack for name in touched if (layer := layer_of(name))}
        for name in self.base.entries if config.everywhere else ():
            module, layer = name.removesuffix(".weight"), layer_of(name)
            if (
                name not in touched
                and module != name
                and layer
                and layer.stack in stacks
                and module.endswith(config.everywhere)
            ):
                raise MismatchError(
                    f"{adapter.where}: target_modules names {printable(module)}, and the adapter has no tensor of it; the "
                    "adapter is not complete"
                )
        if config.tokens and not any(each.kind == "tokens" for each in adapter.modules):
            raise MismatchError(
                f"{adapter.where}: trainable_token_indices names rows, and the adapter has no trainable_tokens_delta; the "
                "adapter is not complete"
            )

    def _find(self, adapter: Adapter, module: Module, names: Names) -> Spot | None:
        try:
            return names.find(wanted_names(module))
        except MismatchError as error:
            raise MismatchError(f"{adapter.where}: {error}") from error

    def _fuse(self, layer: Singles, strength: float) -> None:
        self.now.update(layer.updates(self._all(layer.block), strength, self.base))

    def _in_pieces(self, adapter: Adapter, module: Module, pieces: list[Spot], strength: float) -> None:
        """Updates the tensors that the base has in place of one, each by its rows of the factors."""
        start, rows = 0, [self.base.entries[piece.name].spec.shape[0] for piece in pieces]
        by_rows = [part for part in module.parts if part in ("B", "diff", "diff_b", "B bias", "magnitude")]
        by_rows += [
            part for part in ("dora_scale",) if part in module.parts and module.parts[part].spec.shape[0] == sum(rows)
        ]
        if module.kind not in ("lora", "full", "bias") or any(
            module.parts[part].spec.shape[0] != sum(rows) for part in by_rows
        ):
            raise MismatchError(
                f"{adapter.where}: {printable(module.keys[0])} does not fit {printable(pieces[0].name)} and the tensors "
                f"behind it in {printable(self.base.path)}, which have {sum(rows)} rows together"
            )
        for piece, count in zip(pieces, rows, strict=True):
            parts = {part: rows_of(module.parts[part], start, start + count) for part in by_rows}
            self._apply(adapter, replace(module, parts={**module.parts, **parts}), piece, strength)
            start += count

    def _tensor(self, name: str) -> Source:
        return self.now.get(name) or self.base.entries[name]

    def _all(self, block: Block) -> dict[str, Source]:
        return {name: self._tensor(name) for name in block.names.values()}

    def _apply(self, adapter: Adapter, module: Module, spot: Spot, strength: float) -> None:
        weight = self._tensor(spot.name)
        self._check_kind(adapter, module, spot.name)
        dtype = self.base.entries[spot.name].spec.dtype

        def change() -> None:
            if module.kind == "experts":
                self.now[spot.name] = fused_update(module, weight, strength, self.base)
            elif spot.stop < 0:
                self.now[spot.name] = updated(module, weight, strength, dtype)
            else:
                self.now[spot.name] = _in_rows(module, weight, spot, strength, dtype)

        self._guarded(adapter, module, spot.name, change)

    def _experts(
        self, adapter: Adapter, module: Module, block: Block, singles: dict[str, Singles], strength: float
    ) -> None:
        def change() -> None:
            if module.kind == "experts":
                self.now.update(separate_updates(module, block, self._all(block), strength))
            else:
                singles.setdefault(block.place, Singles(block)).add(module)

        self._guarded(adapter, module, block.place, change)

    def _guarded(self, adapter: Adapter, module: Module, name: str, change: Callable[[], None]) -> None:
        """Makes a change. Raises MismatchError that names the adapter, its tensor and the base's."""
        try:
            change()
        except MismatchError as error:
            raise MismatchError(f"{adapter.where}: {error}") from error
        except RecipeError as error:
            raise MismatchError(
                f"{adapter.where}: {printable(module.keys[0])} does not fit {printable(name)} of "
                f"{printable(self.base.path)}: {error}"
            ) from error

    def _check_kind(self, adapter: Adapter, module: Module, name: str) -> None:
        spec = self.base.entries[name].spec
        if module.kind != "saved" and spec.dtype.kind != "float":
            raise MismatchError(
                f"{adapter.where}: {printable(module.keys[0])} is about {printable(name)}, which "
                f"{printable(self.base.path)} holds as {spec.dtype.torch_name}: its base is quantised; give the weights "
                "that it was made from"
            )

    def index(self, adapters: Sequence[Adapter], text: str) -> CheckpointIndex:
        """Returns the index, with each tensor in the dtype that the base has."""
        base, entries = self.base, dict(self.base.entries)
        resized, grown = list[str](), list[str]()
        for name, source in self.now.items():
            dtype = base.entries[name].spec.dtype
            if source.spec.dtype.kind == "float" and dtype.kind == "float":
                source = rounded(source, dtype)
            entries[name] = source.named(name)
            if source.spec.shape != base.entries[name].spec.shape:
                (resized if is_embedding(name) else grown).append(name)
        self._check_rows(resized, entries, adapters)
        for name, first in base.aliases.items():
            if first in self.now:
                entries[name] = entries[first].named(name)
        if resized:
            shape = entries[resized[0]].spec.shape
            self.warnings.append(
                f"{printable(adapters[-1].index.path)} brings {printable(resized[0])} with {shape[0]} rows; the tokenizer "
                "that belongs to them is the adapter's, so copy its tokenizer files to the output"
            )
        if grown:
            self.warnings.append(
                f"{printable(adapters[-1].index.path)} fills {printable(grown[0])} up to the shape "
                f"{list(entries[grown[0]].spec.shape)}; the base's configuration states the old size, so change it in the "
                "output, or a loader refuses the weights"
            )
        files = tuple(dict.fromkeys((*base.files, *(file for each in adapters for file in each.index.files))))
        warnings = [*base.warnings, *(warning for each in adapters for warning in each.index.warnings), *self.warnings]
        return replace(
            base,
            entries=entries,
            files=files,
            notes=[*base.notes, *self.notes],
            warnings=warnings,
            adapters=tuple(each.index for each in adapters),
            plain=self.plain,
            adapted_as=text,
        )

    def _check_rows(self, resized: list[str], entries: dict[str, Source], adapters: Sequence[Adapter]) -> None:
        """Raises MismatchError if embeddings and head of one vocabulary would have different numbers of rows."""
        rows = {name: (self.base.entries[name].spec.shape[0], entries[name].spec.shape[0]) for name in resized}
        for name, entry in entries.items() if rows else ():
            if not is_embedding(name) or name in self.base.aliases:
                continue
            other = next((each for each, (before, after) in rows.items() if self._rows(name) == before != after), None)
            if other is not None and entry.spec.shape[0] != rows[other][1]:
                raise MismatchError(
                    f"{printable(adapters[-1].index.path)}: {printable(other)} would have {rows[other][1]} rows, and "
                    f"{printable(name)} {entry.spec.shape[0]}; the adapter is not complete"
                )

    def _rows(self, name: str) -> int:
        shape = self.base.entries[name].spec.shape
        return shape[0] if len(shape) == 2 else -1


def _in_rows(module: Module, weight: Source, spot: Spot, strength: float, dtype: DType) -> Source:
    """Returns a tensor in which some rows have the update of a module that is fused with others there."""
    whole, parts = weight.spec.shape[0], list[Source]()
    inner = rows_of(weight, spot.start, spot.stop)
    made = updated(module, inner, strength, dtype)
    if spot.start:
        parts.append(rows_of(weight, 0, spot.start))
    parts.append(made)
    if spot.stop < whole:
        parts.append(rows_of(weight, spot.stop, whole))
    wide = [rounded(part, made.spec.dtype) for part in parts]
    return joined(weight.spec.name, wide)
