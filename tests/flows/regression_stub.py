"""In place of `benchmarks.regression`: leaves the record and the exit code that `behaviour.json` asks for.

`calls.log` notes the arguments of every start.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

behaviour = json.loads(Path("behaviour.json").read_text())
with Path("calls.log").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\n")
print("case toy: 300 pairs", flush=True)
if "hang" in behaviour:
    child = subprocess.Popen(["sleep", "600"])
    Path("hanging.new").write_text(f"{__import__('os').getpid()} {child.pid}")
    Path("hanging.new").rename("hanging")
    while True:
        time.sleep(1)
if "record" in behaviour:
    target = Path("results/regressions/20260102T030405-2222222.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(behaviour["record"]))
if "say" in behaviour:
    print(behaviour["say"], file=sys.stderr)
sys.exit(behaviour["code"])
