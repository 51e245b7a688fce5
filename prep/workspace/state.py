"""The states of a dataset folder, from the view of a build with a given plan."""

from dataclasses import dataclass

from prep.plan.manifest import Manifest


@dataclass(frozen=True)
class Empty:
    """No dataset, and no build."""


@dataclass(frozen=True)
class Unfinished:
    """A build of this plan, which can be resumed. There may also be an earlier dataset."""


@dataclass(frozen=True)
class Complete:
    """A dataset, of this plan or another; `other_build`: there is also an unfinished build of another plan."""

    other_build: bool


@dataclass(frozen=True)
class Other:
    """An unfinished build of another plan; its manifest is None if it is damaged or far too long."""

    manifest: Manifest | None


@dataclass(frozen=True)
class Orphaned:
    """Shards without index or manifest, `file` among them."""

    file: str


State = Empty | Unfinished | Complete | Other | Orphaned
