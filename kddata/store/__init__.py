"""Label stores: what a teacher said about every view of every image, as files that explain themselves.

    store = LabelStore.open("out/labels")
    rows = store.read(0)                 # LabelRows of unit 0, checked against the manifest

Inside, from the ground up: storage (the only way to the files), naming, sealing, rows, entries, manifest, codecs,
columns, formats (arrow and tar), tally, folding, verify, store.
"""

from kddata.store.choice import Choice, Subset, choose
from kddata.store.ensemble import require_members, require_same_rows
from kddata.store.lock import Driver, driving, require_free
from kddata.store.manifest import IndexedShard, Receipt, plan_units
from kddata.store.rows import LabelRows
from kddata.store.storage import open_storage
from kddata.store.store import LabelStore
from kddata.store.units import PlannedUnits, Unit
from kddata.store.verify import Problem, verify_store

__all__ = [
    "Choice",
    "Driver",
    "IndexedShard",
    "LabelRows",
    "LabelStore",
    "PlannedUnits",
    "Problem",
    "Receipt",
    "Subset",
    "Unit",
    "choose",
    "driving",
    "open_storage",
    "plan_units",
    "require_free",
    "require_members",
    "require_same_rows",
    "verify_store",
]
