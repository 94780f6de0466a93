"""Scripts run one after another in one interpreter, for to start Keras takes longer than a tiny training."""

import contextlib
import gc
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path


class Interpreter:
    """A Python process that knows nothing of this project or of the tests, and runs scripts as `python SCRIPT` would.

    It starts with the first of them.
    """

    def __init__(self, folder):
        self._errors = folder / "errors"
        self._process = None

    def run(self, script, *arguments, folder):
        """Run a script in a folder; return its exit code, what it printed, and what it imported from beside itself."""
        if self._process is None:
            self._process = subprocess.Popen(
                # With -P, the folder of this file is not searched for modules.
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors.open("w"),
                text=True,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "80"},
            )
        print(json.dumps([str(folder), str(script), *map(str, arguments)]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise RuntimeError(f"{script} ended the interpreter:\n{self._errors.read_text()[-5000:]}")
        return json.loads(answer)

    def close(self):
        if self._process is not None:
            # It has nothing to tidy up, which would take seconds.
            self._process.kill()
            self._process.communicate()
            self._process = None


def run(folder, script, *arguments):
    """Run a script in this process, and forget what it imported from beside itself."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    home = str(Path(script).parent)
    sys.argv = [script, *arguments]
    sys.path.insert(0, home)
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.path.remove(home)
    imported = [
        name
        for name, module in list(sys.modules.items())
        if (getattr(module, "__file__", None) or "").startswith(home + os.sep)
    ]
    for name in imported:
        del sys.modules[name]
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue(), "imported": imported}


def serve():
    """Run the scripts that standard input names, one in a line, and print what came of each."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        answer = run(*json.loads(line))
        if "keras" in sys.modules:
            sys.modules["keras"].utils.clear_session()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # It takes longer to optimise a graph, and to look for garbage in it, than a tiny training needs.
    gc.set_threshold(100_000, 50)
    if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    serve()
