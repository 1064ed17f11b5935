"""Carries out the Dockerfile in a chroot, where there is no Docker, and tries the result.

    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm FOLDER
    mount -t proc proc FOLDER/proc && mount -t tmpfs -o mode=1777 tmpfs FOLDER/dev/shm
    python tests/with_chroot.py FOLDER cpu
    umount FOLDER/proc FOLDER/dev/shm        before the folder is deleted

As root. The folder stands for the base image, with Debian's Python. Each RUN is run in it, each COPY copies
what .dockerignore leaves. Then the user of the image trains a tiny model, chats with it and serves it.
"""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import test_container as container

TINY = (
    "model=d2 emb_dim=32 head_dim=16 max_target_length=64 vocab_size=280 steps=4"
    " global_batch_tokens=512 eval_tokens=512 run_name=tiny dataset_type=text dataset_path=data/text"
    " tokenizer_path=data/tokenizer"
).split()
# How this machine reaches the package index.
NETWORK = re.compile(r"(PIP|UV)_|SSL_CERT|.*_proxy$", re.IGNORECASE)


class Root:
    """A folder with a system, and the settings that the Dockerfile has made so far."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.workdir, self.user, self.entrypoint = "/", "0", []
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copy(name, self.folder / name[1:])

    def start(self, command, **options):
        """Starts a command in the system, as the user and in the folder of the image."""
        network = {key: value for key, value in os.environ.items() if NETWORK.match(key)}
        words = ["/usr/sbin/chroot", f"--userspec={self.user}", self.folder, "/bin/sh", "-c"]
        script = f'cd {self.workdir} && exec "$@"'
        return subprocess.Popen(
            [*words, script, "sh", *command], env=network | self.environment, **options
        )

    def run(self, command):
        """The output of a command, which must succeed."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = process.communicate()[0]
        print(output, end="", flush=True)
        if process.returncode:
            sys.exit(f"{command} ended with status {process.returncode}")
        return output

    def copy(self, names, target):
        """Copies files of the tree, or the whole tree, without what .dockerignore names."""
        tracked = subprocess.check_output(["git", "ls-files"], cwd=container.ROOT, text=True)
        for path in map(Path, tracked.splitlines()):
            if ("." in names or str(path) in names) and not container.is_ignored(str(path)):
                inner = path if "." in names else Path(path.name)
                to = self.folder / self.workdir[1:] / target / inner
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(container.ROOT / path, to)

    def carry_out(self, instruction, rest):
        """One line of the Dockerfile."""
        print(f"==== {instruction} {rest}", flush=True)
        match instruction:
            case "RUN":
                self.run(["/bin/sh", "-c", rest])
            case "COPY":
                *names, target = rest.split()
                self.copy(names, target)
            case "ENV":
                for name, value in re.findall(r"(\w+)=(\S+)", rest):
                    value = value.replace("$PATH", self.environment["PATH"])
                    self.environment[name] = value
            case "WORKDIR":
                self.workdir = rest
                (self.folder / rest[1:]).mkdir(exist_ok=True)
            case "USER":
                self.user = rest
            case "ENTRYPOINT":
                self.entrypoint = container.json.loads(rest)


def build(root, target):
    """Carries out the lines of a target."""
    for line in container.STAGES[target]:
        root.carry_out(*line)


def use(root):
    """Trains, chats and serves as the user of the image."""
    run = [*root.entrypoint]
    assert "maxnano serve" not in root.run(run) and root.user == "1000"
    text = root.folder / "maxnano/data/text"
    text.mkdir(exist_ok=True)
    for name in ("a.txt", "b.txt"):
        (text / name).write_text("The dog ran to the house, and the cat sat on the mat. " * 60)
    root.run([*run, "train-tokenizer", *TINY])
    assert "Validation at step 4" in root.run([*run, "train", *TINY, "data_readers=1"])
    root.run([*run, "chat", "run_name=tiny", "prompt=The dog", "max_new_tokens=8"])
    root.environment["MAXNANO_API_KEY"] = "0123456789abcdef"
    words = ["serve", "run_name=tiny", "serve_host=0.0.0.0", "serve_port=0"]
    with root.start([*run, *words], stdout=subprocess.PIPE, text=True) as server:
        line = next(line for line in server.stdout if "/health" in line)
        print(line, end="")
        port = re.search(r":(\d+)/health", line)[1]
        for line in server.stdout:
            print(line, end="", flush=True)
            if line.startswith("Serving"):
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            print(answer.status, answer.read().decode())
        server.terminate()
    print(f"the image works: {root.folder}")


def main(folder, target):
    root = Root(folder)
    build(root, target)
    use(root)


if __name__ == "__main__":
    main(*sys.argv[1:])
