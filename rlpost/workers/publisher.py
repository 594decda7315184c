"""What one learner rank publishes: the image of the version it published last, and what leads from it to the next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from rlpost.core.delta import TensorPatch, encode_section
from rlpost.core.patch import WeightPatch
from rlpost.engines.base import WeightSection


@dataclass(frozen=True, slots=True)
class _Held:
    """A section as it was published."""

    shape: tuple[int, ...]
    start: int
    values_N: Tensor
    checksum: str


class Publisher:
    """Turns streamed sections of a policy into patches, with one image of them in host memory."""

    def __init__(self, *, changes: bool = True) -> None:
        """
        Args:
            changes: publish what changed since the last version; False: every version whole.
        """
        self._changes = changes
        self._image: dict[str, _Held] = {}
        self._version: int | None = None

    def publish(self, version: int, sections: Iterable[WeightSection]) -> WeightPatch:
        """The next version, as changes of the last one; the first one whole, its payloads views of the image.

        Raises:
            RuntimeError: when a weight is not finite. Such a policy must not reach a sampler.
        """
        base = self._version if self._changes else None
        patches = {section.name: self._patch(version, section, whole=base is None) for section in sections}
        self._version = version
        return WeightPatch(version=version, base=base, tensors=patches)

    def complete(self) -> WeightPatch:
        """The version published last, whole: for a sampler that holds another one. Its payloads are views of the image."""
        assert self._version is not None, "nothing was published yet"
        tensors = {name: _whole(held.shape, held.start, held.values_N) for name, held in self._image.items()}
        return WeightPatch(version=self._version, base=None, tensors=tensors)

    def _patch(self, version: int, section: WeightSection, *, whole: bool) -> TensorPatch:
        """To the present values of one section, which become the image."""
        values_N = section.values_N.detach().cpu()
        if not values_N.isfinite().all():
            raise RuntimeError(
                f"version {version} has non-finite values in {section.name}: the run has diverged, and would again from its"
                " last checkpoint. Begin in another run_dir with a lower lr or a smaller max_grad_norm"
            )
        held = self._image.get(section.name)
        if held is None or whole:
            values_N = values_N.clone() if held is None else held.values_N.copy_(values_N)
            patch = _whole(section.shape, section.start, values_N)
        else:
            patch = encode_section(
                held.values_N, values_N, shape=held.shape, start=held.start, before_checksum=held.checksum
            )
            values_N = held.values_N.copy_(values_N)
        self._image[section.name] = _Held(section.shape, section.start, values_N, patch.sections[0].after)
        return patch


def _whole(shape: tuple[int, ...], start: int, values_N: Tensor) -> TensorPatch:
    return encode_section(None, values_N, shape=shape, start=start, compress=False)
