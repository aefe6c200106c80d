"""How a component comes by its client of the Central Hub, and by a model id that the hub can know."""

from __future__ import annotations

from typing import Any

from flip_observability.constants import ModelStatus
from flip_observability.errors import report
from flip_observability.utils import canonical_uuid


class UsesFlip:
    """Gives a component the attribute ``flip``: what it was given, or built from the environment when first read.

    The object is kept under another name than the constructor's argument: the export of an NVFLARE ``FedJob`` writes
    every attribute that is called as an argument is, with or without an underscore.
    """

    _hub_client: Any = None
    _called = "update_status"
    """What the component calls of the object. A job's configuration can name anything as its client, 1 for example."""

    @property
    def flip(self) -> Any:
        """The client object.

        Raises:
            SettingsError: it must be built, and the environment does not allow it.
        """
        if self._hub_client is None:
            from flip_observability.hub import FLIP

            self._hub_client = FLIP()
        return self._hub_client

    @flip.setter
    def flip(self, client: Any) -> None:
        if client is not None and not callable(getattr(client, self._called, None)):
            report("foreign_client", "BadArgument", f"the job's client has no {self._called}; ours is used instead")
            client = None
        self._hub_client = client

    def _accept_model_id(self, given: Any) -> str:
        """Give the canonical spelling of a configured model id, and nothing for one that is still to be found.

        Raises:
            ValueError: for a model id that is no UUID. The client is told ERROR first, where it was given and takes it;
                one of ours is not built for this, since it refuses such an id.
        """
        if given is None or (isinstance(given, str) and not given.strip()):
            return ""
        model_id = canonical_uuid(given)
        if model_id is not None:
            return model_id
        if self._hub_client is not None:
            try:
                self._hub_client.update_status(given, ModelStatus.ERROR)
            except Exception as error:  # noqa: BLE001 - most clients refuse what is no UUID; the error below says it
                report("model_id", error, "the client takes no status for a model id that is no UUID")
        raise ValueError(f"The model ID: {_shown(given)} is not a valid UUID")


def _shown(given: Any) -> str:
    return repr(given[:100]) if isinstance(given, str) else f"of type {type(given).__name__}"
