"""Stands in for gcloud in tests: records what it is asked, refuses what gcloud would, plays a script.

FAKE_GCLOUD names a folder with `scenario.json`:

    {"buckets": {NAME: LOCATION}, "zones": {ZONE: [MACHINE, ...]}, "undeletable": [ZONE, ...], "closed": [ZONE, ...],
     "may_not": [RIGHT, ...], "offline": BOOL}

A zone that is closed, or not named, can neither be asked nor looked into. RIGHT is what the machines' service account
may not do: write, read, delete. Offline, this computer has no network. The n-th creation in a zone plays its n-th
MACHINE, the last one again and again:

    {"refuse": MESSAGE}       the request is refused
    {"states": [STATE, ...]}  a look shows the next state, the last one for good; NONE: it is there no more
    {"reason": MESSAGE}       why it is FAILED
    {"preempt": {"step": N, "after": SECONDS, "vanish": BOOL}}
                              the machine dies that long after checkpoint N lies in a bucket, or, with null, after its
                              job has started; its request is SUSPENDED, or stays ACTIVE
    {"hang": N, "slow": SECONDS, "deaf": true}
                              the first N connections never answer; each one takes that long; all are refused
    {"startup": false}        startup scripts are not run
    {"hosts": N, "port": N}   a slice of so many hosts, whose processes find each other at the port

A machine is a folder that its commands run in, as if at home; it goes when the machine goes. gs:// is the folder
`buckets`, or what STORAGE_EMULATOR_HOST names. What was asked lies in `calls.jsonl`.

Texts of errors are those of gcloud and of the service: command_lib/compute/tpus/tpu_vm/exceptions.py of gcloud, "Quota
limit" and "Location ... is not found" as reported by users, https://cloud.google.com/tpu/docs/quota.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time

ROOT = os.environ["FAKE_GCLOUD"]
BUCKETS = f"{ROOT}/buckets"
STORE = os.environ.get("STORAGE_EMULATOR_HOST")
# Most calls take hardly longer than imports: what few of them need, pathlib too, is imported there.
if STORE:
    import urllib.parse
    import urllib.request
MACHINE = os.environ.get("FAKE_MACHINE")  # set where a machine calls: its zone/name
HERE = os.path.dirname(os.path.abspath(__file__))
# Of this computer's environment, a machine has its programs alone, and what leads to an object store.
HANDED_ON = (
    "PATH", "FAKE_GCLOUD", "XLA_FLAGS", "STORAGE_EMULATOR_HOST", "FSSPEC_GCS_TOKEN", "TENSORSTORE_GCS_HTTP_URL",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "no_proxy",
)  # fmt: skip

# Command: number of positional arguments, flags with a value, flags without. As of gcloud 528; outside of alpha, tpu-vm
# has no IAP.
WIDE = ({"project", "format"}, {"quiet"})
SSH = {"zone", "command", "worker", "ssh-flag"}
SCP = {"zone", "worker", "scp-flag"}
COMMANDS = {
    "auth list": (0, {"filter"}, set()),
    "compute tpus queued-resources create": (
        1,
        {"node-id", "zone", "accelerator-type", "runtime-version", "valid-until-duration", "metadata-from-file",
         "scopes", "service-account", "network", "subnetwork"},
        {"spot", "async", "internal-ips"},
    ),
    "compute tpus queued-resources describe": (1, {"zone"}, set()),
    "compute tpus queued-resources delete": (1, {"zone"}, {"force", "async"}),
    "compute tpus queued-resources list": (0, {"zone", "filter"}, set()),
    "compute tpus queued-resources ssh": (1, {*SSH, "node"}, {"internal-ip", "tunnel-through-iap"}),
    "compute tpus queued-resources scp": (2, {*SCP, "node"}, {"recurse", "internal-ip", "tunnel-through-iap"}),
    "compute tpus tpu-vm list": (0, {"zone", "filter"}, set()),
    "compute tpus tpu-vm delete": (1, {"zone"}, {"async"}),
    "compute tpus tpu-vm ssh": (1, SSH, {"internal-ip"}),
    "compute tpus tpu-vm scp": (2, SCP, {"recurse", "internal-ip"}),
    "storage buckets describe": (1, set(), set()),
    "storage ls": (1, set(), set()),
    "storage cat": (1, set(), set()),
    "storage rm": (1, set(), {"recursive"}),
    "storage cp": (2, set(), {"recursive"}),
    "storage rsync": (2, set(), {"recursive"}),
}  # fmt: skip


def die(message, status=1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(status)


def parse(argv):
    """(command, positional arguments, flags), or the end, as gcloud would."""
    command = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if command is None:
        die(f"Invalid choice: {argv}", 2)
    count, valued, bare = COMMANDS[command]
    given, flags = [], {}
    for word in argv[len(command.split()) :]:
        if not word.startswith("--"):
            given.append(word)
            continue
        name, has_value, value = word[2:].partition("=")
        if name not in (valued | WIDE[0] if has_value else bare | WIDE[1]):
            die(f"unrecognized arguments: {word}", 2)
        flags[name] = f"{flags[name]} {value}" if name in flags else value
    if len(given) != count:
        die(f"{command} takes {count} positional arguments, not {given}", 2)
    if "zone" in valued and "zone" not in flags:
        die("argument --zone: Must be specified.", 2)
    if "quiet" not in flags:
        die("this would ask, and nobody is there to answer", 2)
    return command, given, flags


@contextlib.contextmanager
def world():
    """What exists, locked and written back: {"created": {zone: count}, "machines": {"zone/name": machine}}."""
    with open(f"{ROOT}/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = f"{ROOT}/world.json"
        content = (
            json.loads(text_of(path)) if os.path.exists(path) else {"created": {}, "machines": {}}
        )
        try:
            yield content
        finally:
            with open(f"{ROOT}/world.new", "w") as file:
                file.write(json.dumps(content))
            os.replace(file.name, path)  # tests read it without the lock


def text_of(path):
    with open(path) as file:
        return file.read()


def scenario():
    return json.loads(text_of(f"{ROOT}/scenario.json"))


def home(key, worker=0):
    """The home of a host: of the first one the machine's folder, of others a folder in it."""
    return f"{ROOT}/machines/{key}" + (f"/worker{worker}" if worker else "")


def local(text, key=None, worker=0):
    """The text with the folders that stand for gs:// and for a machine's own."""
    if not STORE:
        text = text.replace("gs://", f"{BUCKETS}/")
    return text.replace("/var/tmp/maxnano", f"{home(key, worker)}/watch") if key else text


# ---- Storage


def request(method, path, content=None):
    call = urllib.request.Request(f"{STORE}{path}", data=content, method=method)
    with urllib.request.urlopen(call) as answer:
        return answer.read()


def split(url):
    bucket, _, name = (
        url.removeprefix("gs://").removeprefix("anonymous@").partition("/")
    )  # as pyarrow wants it
    return bucket, name


def names(place):
    """All files at a path or gs:// address, or below it, relative to it ("" is itself)."""
    if not place.startswith("gs://"):
        if os.path.isfile(place):
            return [""]
        found = [
            os.path.join(folder, name) for folder, _, files in os.walk(place) for name in files
        ]
        return [os.path.relpath(path, place) for path in found]
    bucket, prefix = split(place.rstrip("/"))
    found, page = [], ""
    while True:
        query = urllib.parse.urlencode(
            {"prefix": prefix, "pageToken": page} if page else {"prefix": prefix}
        )
        answer = json.loads(request("GET", f"/storage/v1/b/{bucket}/o?{query}"))
        found += [item["name"] for item in answer.get("items", [])]
        page = answer.get("nextPageToken")
        if not page:
            break
    found = [name[len(prefix) :] if prefix else f"/{name}" for name in found]
    return [name[1:] for name in found if not name or name.startswith("/")]


def read(place):
    if place.startswith("gs://"):
        bucket, name = split(place)
        return request(
            "GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        )
    with open(place, "rb") as file:
        return file.read()


def write(place, content):
    if place.startswith("gs://"):
        bucket, name = split(place)
        request(
            "POST",
            f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={urllib.parse.quote(name)}",
            content,
        )
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(content)


def remove(place):
    if place.startswith("gs://"):
        bucket, name = split(place)
        request("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")
    else:
        os.remove(place)


def storage(command, given):
    right = "read" if command in ("storage ls", "storage cat") else "write"
    bucket = f"{BUCKETS}/" if not STORE else "gs://"
    if (
        MACHINE
        and right in scenario().get("may_not", [])
        and any(word.startswith(bucket) for word in given)
    ):
        action = "list" if right == "read" else "create"
        die(
            f"HTTPError 403: {account()} does not have storage.objects.{action} access to the bucket."
        )
    places = [local(word) for word in given]
    if places[0] == "-":
        return write(places[1], sys.stdin.buffer.read())
    found = names(places[0])
    if not found:
        die("One or more URLs matched no objects.")
    for name in found:
        source = f"{places[0].rstrip('/')}/{name}" if name else places[0]
        if command == "storage cat":
            sys.stdout.buffer.write(read(source))
        elif command == "storage rm":
            remove(source)
        elif command != "storage ls":
            write(f"{places[1].rstrip('/')}/{name}" if name else places[1], read(source))


def account():
    return "123-compute@developer.gserviceaccount.com"


# ---- Machines


def switch_off(key):
    """Ends what runs on a machine and takes its disk. In a process that is not the machine's own."""
    import glob
    import shutil
    import subprocess

    if key == MACHINE:
        command = [sys.executable, "-S", f"{HERE}/gcloud", "--switch-off", key]
        kept = {name: value for name, value in os.environ.items() if name != "FAKE_MACHINE"}
        subprocess.run(command, start_new_session=True, env=kept, check=True)
        return
    folder = glob.escape(home(key))
    for pid in [*glob.glob(f"{folder}/*/pid"), *glob.glob(f"{folder}/worker*/*/pid")]:
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(text_of(pid)), signal.SIGKILL)
    time.sleep(0.1)  # until they have died, and write no more
    shutil.rmtree(home(key), ignore_errors=True)


def newest_checkpoint():
    place = "gs://ours" if STORE else BUCKETS
    try:
        found = [
            re.search(r"/checkpoints/(\d+)/MANIFEST.json$", f"/{name}") for name in names(place)
        ]
    except OSError:  # a folder has gone while it was read
        return -1
    return max((int(match[1]) for match in found if match), default=-1)


def has_job(key):
    pid = f"{home(key)}/MaxNano/pid"
    return os.path.exists(pid) and text_of(pid).strip()


def watch(key, step, after, vanish):
    """Preempts the machine."""
    while os.path.exists(home(key)):
        if newest_checkpoint() >= step if step is not None else has_job(key):
            time.sleep(after)
            with world() as content:
                if key not in content["machines"]:
                    return
                if vanish:
                    content["machines"][key]["vanished"] = True
                else:
                    content["machines"][key]["states"] = ["SUSPENDING", "SUSPENDED"]
            return switch_off(key)
        time.sleep(0.02)


def check_zone(zone):
    if zone in scenario().get("closed", []) or zone not in scenario()["zones"]:
        die(f"PERMISSION_DENIED: Location {zone} is not found or access is unauthorized.")


def create(name, zone, flags):
    with world() as content:
        if f"{zone}/{name}" in content["machines"]:
            die(f"ALREADY_EXISTS: Resource '{name}' already exists")
        plays = scenario()["zones"][zone]
        number = content["created"].get(zone, 0)
        content["created"][zone] = number + 1
        machine = plays[min(number, len(plays) - 1)]
        if "refuse" in machine:
            die(machine["refuse"])
        startup = flags.get("metadata-from-file", "").partition("startup-script=")[2]
        script = text_of(startup) if startup and machine.get("startup", True) else ""
        content["machines"][f"{zone}/{name}"] = {**machine, "script": script}


def describe(name, zone, flags):
    key = f"{zone}/{name}"
    with world() as content:
        if MACHINE and "delete" in scenario().get("may_not", []):
            die(
                f"PERMISSION_DENIED: Permission 'tpu.queuedResources.get' denied on 'projects/p/locations/{zone}'"
            )
        machine = content["machines"].get(key)
        if machine is None:
            die(
                f"NOT_FOUND: Resource 'projects/p/locations/{zone}/queuedResources/{name}' was not found"
            )
        state = machine["states"][0]
        if len(machine["states"]) > 1:
            machine["states"].pop(0)
        if machine["states"] == ["NONE"]:
            del content["machines"][key]
        boot(key, machine)
    initiator = "SERVICE" if state.startswith("SUSPEND") else ""
    values = [state, initiator, machine.get("reason", "") if state == "FAILED" else ""]
    print("|".join(values) if "separator" in flags.get("format", "") else state)


def delete(name, zone):
    with world() as content:
        if zone in scenario().get("undeletable", []):
            die("INTERNAL: try again")
        if MACHINE and "delete" in scenario().get("may_not", []):
            die(
                f"PERMISSION_DENIED: Permission 'tpu.queuedResources.delete' denied on 'projects/p/locations/{zone}'"
            )
        content["machines"].pop(f"{zone}/{name}", None)
    switch_off(f"{zone}/{name}")


def show(zone):
    with world() as content:
        for key, machine in content["machines"].items():
            if key.startswith(f"{zone}/"):
                print(f"{key.split('/')[1]}\t{machine['states'][0]}")


def environment(key, worker, machine):
    kept = {name: value for name, value in os.environ.items() if name in HANDED_ON}
    folder = home(key, worker)
    own = {
        "HOME": folder,
        "WATCH_FOLDER": f"{folder}/watch",
        "FAKE_MACHINE": key,
        "FAKE_WORKER": str(worker),
    }
    if "port" in machine:
        own["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{machine['port']}"
        own |= {"JAX_PROCESS_ID": str(worker), "JAX_NUM_PROCESSES": str(machine["hosts"])}
    return {**kept, **own}


def workers(machine, flags):
    """The hosts that a connection goes to."""
    if flags.get("worker") == "all":
        return range(machine.get("hosts", 1))
    return [int(flags.get("worker", 0))]


def boot(key, machine):
    """The homes of a machine that has come about, with its startup script running."""
    is_off = machine.get("vanished") or machine.get("off")
    if machine["states"][0] != "ACTIVE" or os.path.exists(home(key)) or is_off:
        return
    assert os.path.exists(f"{HERE}/sudo"), "without it a machine would switch off this computer"
    import subprocess

    quiet = {"start_new_session": True, "stdin": subprocess.DEVNULL}
    nowhere = subprocess.DEVNULL
    for worker in range(machine.get("hosts", 1)):
        folder = home(key, worker)
        os.makedirs(folder)
        if not machine["script"]:
            continue
        os.mkdir(f"{folder}/boot")
        script = f"{folder}/boot/startup.sh"
        with open(script, "w") as file:
            file.write(local(machine["script"], key, worker))
        own = environment(key, worker, machine)
        with open(f"{folder}/boot/log", "w") as log:
            process = subprocess.Popen(
                ["bash", script], **quiet, env=own, cwd=folder, stdout=log, stderr=log
            )
        with open(f"{folder}/boot/pid", "w") as file:
            file.write(str(process.pid))
    if "preempt" in machine:
        watching = ["--watch", key, json.dumps(machine["preempt"])]
        command = [sys.executable, "-S", f"{HERE}/gcloud", *watching]
        subprocess.Popen(command, **quiet, stdout=nowhere, stderr=nowhere)


def active(name, zone):
    """A machine that answers, and its name."""
    key = f"{zone}/{name}"
    with world() as content:
        machine = content["machines"].get(key, {"states": ["NONE"]})
        hangs = machine.get("hang", 0)
        machine["hang"] = hangs - 1
        boot(key, machine)
    if machine.get("vanished"):
        die(
            'This TPU has terminal state "PREEMPTED", so it cannot be used or updated. '
            "Please delete it and create a new one."
        )
    if machine["states"] != ["ACTIVE"] or machine.get("off") or machine.get("deaf"):
        die(f"[255] ssh: connect to {name}: Connection refused", 255)
    if hangs > 0:
        time.sleep(1000)
    time.sleep(machine.get("slow", 0))
    return key, machine


def main():
    if sys.argv[1:2] == ["--watch"]:
        return watch(sys.argv[2], **{"vanish": False, **json.loads(sys.argv[3])})
    if sys.argv[1:2] == ["--switch-off"]:
        return switch_off(sys.argv[2])
    if sys.argv[1:2] == ["--power-off"]:
        with world() as content:
            content["machines"][MACHINE]["off"] = True
        return switch_off(MACHINE)
    command, given, flags = parse(sys.argv[1:])
    with open(f"{ROOT}/calls.jsonl", "a") as calls:
        call = {"command": command, "given": given, "flags": flags, "machine": MACHINE}
        calls.write(json.dumps(call) + "\n")
    name, zone = (given or [""])[0], flags.get("zone")
    if scenario().get("offline") and not MACHINE:
        die("There was a problem refreshing your current auth tokens: Unable to find the server")
    if zone:
        check_zone(zone)
    if command == "auth list":
        print(account())
    elif command.endswith("queued-resources create"):
        create(name, zone, flags)
    elif command.endswith("queued-resources describe"):
        describe(name, zone, flags)
    elif command.endswith(" delete"):
        delete(name, zone)
    elif command.endswith(" list"):
        show(zone)
    elif command.endswith("ssh"):
        key, machine = active(name, zone)
        print(
            "Using ssh batch size of 1. Attempting to SSH into 1 nodes with a total of 1 workers.",
            file=sys.stderr,
        )
        import subprocess

        started = [
            subprocess.Popen(
                ["bash", "-c", local(flags["command"], key, worker)],
                cwd=home(key, worker),
                env=environment(key, worker, machine),
            )
            for worker in workers(machine, flags)
        ]
        return max(process.wait() for process in started)
    elif command.endswith("scp"):
        import shutil

        name, _, path = given[1].partition(":")
        key, machine = active(name, zone)
        for worker in workers(machine, flags):
            shutil.copy(given[0], f"{home(key, worker)}/{path}")
    elif command == "storage buckets describe":
        location = scenario()["buckets"].get(name.removeprefix("gs://"))
        print(location) if location else die(f"HTTPError 404: {name} not found")
    else:
        storage(command, given)
    return 0
