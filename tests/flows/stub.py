"""A stage that takes no time: writes what dvc.yaml declares, as a function of what it declares to read.

`behaviour.json` may tell a stage to hang, to fail, or to measure something else (`salt`); `calls.log` notes
every start.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

stage = os.environ["DVC_STAGE"]
verb, _, cell = stage.partition("@")
task, _, method = cell.partition("-")


def paths(kind):
    for entry in yaml.safe_load(Path("dvc.yaml").read_text())["stages"][verb].get(kind, []):
        name = entry if isinstance(entry, str) else next(iter(entry))
        yield Path(name.replace("${item.task}", task).replace("${item.method}", method))


def digest():
    files = [path for root in paths("deps") for path in sorted([root, *root.rglob("*")]) if path.is_file()]
    return hashlib.sha256(b"".join([stage.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


with Path("calls.log").open("a") as calls:
    calls.write(f"{stage} {os.getpid()} {os.environ['EUGEN_PIPELINE_RUN']}\n")
behaviour = (
    json.loads(Path("behaviour.json").read_text()).get(stage, {}) if Path("behaviour.json").exists() else {}
)
print(f"seed 1/1 of {stage}", flush=True)
if "hang" in behaviour:
    child = subprocess.Popen(["sleep", "600"])
    write(Path("hanging"), f"{os.getpid()} {child.pid}")
    while True:
        time.sleep(1)
if "fail" in behaviour:
    print(f"ValueError: {behaviour['fail']}", file=sys.stderr)
    sys.exit(behaviour.get("code", 1))
for out in [*paths("outs"), *paths("metrics")]:
    value = hashlib.sha256(
        f"{digest()} {out}{behaviour.get('salt', '')}".encode()
    ).hexdigest()  # no two outputs are equal
    if out.suffix == ".json":
        write(out, json.dumps({"value": int(value[:6], 16)}))
    elif out.suffix == ".csv":
        write(out, f"task,quality\nvision,{int(value[:6], 16)}\n")
    else:
        write(out if out.suffix else out / "content", value)
    if "megabytes" in behaviour and not out.suffix:
        with (out / "large").open("wb") as large:
            for _ in range(behaviour["megabytes"]):
                large.write(os.urandom(2**20))
