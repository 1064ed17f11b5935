"""train.py with a pause before each step, so that a test can interrupt it in the middle.

python tests/slow_train.py SECONDS configs/base.yml [key=value ...]
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    from MaxNano import pyconfig, train

    seconds, next_batch = float(sys.argv.pop(1)), train.next_batch

    def pause(*arguments):
        time.sleep(seconds)
        return next_batch(*arguments)

    train.next_batch = pause
    sys.exit(pyconfig.launch(train.main))
