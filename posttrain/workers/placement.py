"""Room for actors that are of use only together: all of it or none, within a deadline."""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain.workers.cluster import not_ready
from posttrain.workers.settings import ActorResources


class Reservation:
    """A placement group of `count` equal bundles, as near to each other as there is room.

    PlacementError if they are not free within `deadline_s`; nothing is held then.
    """

    def __init__(
        self, name: str, resources: ActorResources, *, count: int, deadline_s: float
    ) -> None:
        bundle = {"CPU": resources.cpus, "GPU": resources.gpus}
        asked = {device: amount for device, amount in bundle.items() if amount}
        self._group = placement_group([asked] * count, strategy="PACK") if asked else None
        if self._group is not None and not self._group.wait(deadline_s):
            self.release()
            raise not_ready(name, resources, deadline_s)

    def place(self, number: int) -> Any:
        """Ray's scheduling strategy for the actor `number`, counted from 0."""
        if self._group is None:
            return None
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)

    def release(self) -> None:
        """Ends the actors in it, too."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
