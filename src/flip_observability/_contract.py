"""Which of the hub's contracts a server speaks when nobody says: the one of the FLIP that is installed."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Literal, TypeAlias, get_args

ContractName: TypeAlias = Literal["2026-05", "2026-10"]

WITHOUT_FLIP: ContractName = "2026-05"
"""What is spoken where no flip-utils is installed."""
SPEAKS_2026_10 = (0, 4)
"""From this version on flip-utils says ``RUNNING``, ``fl_client_name`` and round events; 0.1 says none of them."""


def installed_flip() -> str | None:
    """The version of flip-utils that this Python has installed; None when it has none."""
    try:
        return importlib.metadata.version("flip-utils")
    except importlib.metadata.PackageNotFoundError:
        return None


def contract_of(version: str | None) -> ContractName:
    """The contract that a version of flip-utils speaks.

    Args:
        version: as its package has it; None for no flip-utils.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        return WITHOUT_FLIP
    return "2026-10" if (int(numbers[1]), int(numbers[2])) >= SPEAKS_2026_10 else "2026-05"


def in_need(told: str | None) -> ContractName:
    """The contract that was asked for or, where that is none, the one of the installed FLIP."""
    return next((name for name in get_args(ContractName) if name == told), contract_of(installed_flip()))


def in_words(contract: str) -> str:
    """One sentence for the log: which contract is spoken, and whether the installed FLIP speaks another one."""
    version = installed_flip()
    found = f"flip-utils {version} is installed" if version else "no flip-utils is installed"
    told = f"The hub is spoken to in contract {contract}; {found}"
    if version and contract_of(version) != contract:
        return f"{told}, which speaks {contract_of(version)}"
    return told
