"""Care: what keeps a finished store right for years, and makes one of several.

    repair(job)             # damaged and missing files again, byte for byte
    collect_garbage(url)    # what no manifest names is removed
    merge(out, stores)      # stores of one spec that were labelled apart
    convert(store, out)     # the same rows in another format, or rounded
    export_parquet(store, "labels.parquet")
    check_pixels(store)     # views are rendered again and compared with their hashes
    audit(store, teacher)   # the teacher is asked again, and its numbers are judged

Extending a store is labelling: `labelling.label_store(job, extend=True)`. Finding damage is `store.verify_store`.
"""

from kddata.care.audit import Audit, audit
from kddata.care.convert import convert
from kddata.care.export import Exported, export_parquet
from kddata.care.garbage import Stray, collect_garbage
from kddata.care.merge import merge
from kddata.care.pixels import check_pixels
from kddata.care.repair import Repaired, repair

__all__ = [
    "Audit",
    "Exported",
    "Repaired",
    "Stray",
    "audit",
    "check_pixels",
    "collect_garbage",
    "convert",
    "export_parquet",
    "merge",
    "repair",
]
