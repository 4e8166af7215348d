"""The seed of this run of the GPU tests: drawn afresh each time unless SM12X_TEST_SEED repeats one."""

import os

SEED = int(os.environ.get("SM12X_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
