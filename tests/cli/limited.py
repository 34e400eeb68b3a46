"""Runs a command with limits, and tells what it took. Usage: python limited.py LOG BYTES SECONDS COMMAND …

A process of its own, since Linux counts the memory of whoever starts a process as that process' peak, and a test run
grows. Writes LOG/out and LOG/err; prints exit code and peak resident memory in bytes, as JSON.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    log, size, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        signal.alarm(seconds)  # outlives exec

    with (log / "out").open("w") as out, (log / "err").open("w") as err:
        child = subprocess.Popen(sys.argv[4:], stdout=out, stderr=err, stdin=subprocess.DEVNULL, preexec_fn=limit)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps([child.returncode, usage.ru_maxrss * 1024]))


if __name__ == "__main__":
    main()
