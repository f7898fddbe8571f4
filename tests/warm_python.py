"""A Python that has imported what train_dist.py imports, and forks itself for each run of it or of a module.

    python warm_python.py ROOT        JSON lines: requests on standard input, their answers on standard output

{"start": words, "env": {name: value}, "output": file}    ->  the process id of a new `python words`
{"poll": process id}                                      ->  its exit code (-N after signal N), null before

The fork happens before any thread or process group exists, and the run ends with the normal finalisation of Python. So
a run behaves like `python train_dist.py`, but that it does not show whether a program imports what it uses.
"""

import importlib
import json
import os
import runpy
import sys

MODULES = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "nvidia.dali.fn",
    "training.build",
    "training.recipes",
    "training.profile.run_profile",
    "pipelines.executors.dali_executor",
    "pipelines.executors.ffcv_executor",
    "pipelines.executors.torchvision_executor",
    "pipelines.sources.beton",
    "pipelines.sources.folder",
)


def warm_up() -> None:
    """Import what runs import, at their start or later, without starting threads."""
    for name in MODULES:
        importlib.import_module(name)


def serve() -> list[str]:
    """Answer requests until the input ends; in a forked process, return the words of its command line."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                become(request["env"], request["output"])
                return request["start"]
            answer = pid
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    os._exit(0)


def become(env: dict[str, str], output: str) -> None:
    """Take the environment and the output of a run, in a new process group."""
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(env)
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(nothing, 0), os.dup2(file, 1), os.dup2(file, 2)
    os.close(nothing), os.close(file)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]
    warm_up()
    print(json.dumps("ready"), flush=True)
    script, *arguments = serve()
    if script == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
