"""Label stores: what a teacher said about every view of every image, as files that explain themselves.

    store = LabelStore.open("out/labels")
    rows = store.read(0)                 # LabelRows of unit 0, checked against the manifest

Inside, from the ground up: storage (the only way to the files), sealing, rows, codecs, arrow, manifest, tally, verify,
store.
"""

from kddata.store.manifest import IndexedShard, Receipt, Unit
from kddata.store.rows import LabelRows
from kddata.store.storage import open_storage
from kddata.store.store import LabelStore
from kddata.store.verify import Problem, verify_store

__all__ = ["IndexedShard", "LabelRows", "LabelStore", "Problem", "Receipt", "Unit", "open_storage", "verify_store"]
