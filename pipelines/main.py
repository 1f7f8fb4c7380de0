"""The command `meanflow`: every stage by its name.

    meanflow train demo --data latents --storage runs --run-name first

runs the same code as `python -m pipelines.train demo ...`. Unlike the latter, it also works in a folder that has its own
`pipelines` or `deploy` folder.
"""

import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

# Group, command, module, what it does.
COMMANDS = (
    ("Prepare data", "encode", "pipelines.encode", "images to latents"),
    ("Prepare data", "check", "pipelines.check", "is a latent dataset complete and undamaged?"),
    ("Prepare data", "autoencoder", "pipelines.autoencoder", "train an autoencoder on your own images"),
    ("Prepare data", "latent-cache", "pipelines.latent_cache", "list and delete a node's copies of latents"),
    ("Train", "plan", "pipelines.plan", "memory, time and cost of a training, before it starts"),
    ("Train", "train", "pipelines.train", "latents to a generator"),
    ("Train", "refine", "pipelines.refine", "train a generator on, by the Frechet loss"),
    ("Train", "sweep", "pipelines.sweep", "many trainings over settings of a preset"),
    ("Train", "convert", "pipelines.convert", "a public checkpoint to a generator"),
    ("Measure", "evaluate", "pipelines.evaluate", "sample from a generator and measure: FID and others"),
    ("Measure", "reference", "pipelines.reference", "statistics of real images, for evaluate and refine"),
    ("Measure", "judge", "pipelines.judge", "train a small classifier that measures generated images"),
    ("Measure", "side-by-side", "pipelines.side_by_side", "several evaluations in one table"),
    ("Measure", "before-after", "pipelines.before_after", "a refined generator beside the one before"),
    ("Measure", "compare", "pipelines.compare", "training methods side by side"),
    ("Serve", "serve", "deploy.serve", "an endpoint on this machine"),
    ("Serve", "models", "deploy.models", "where an alias of MLflow leads, and where it comes from"),
    ("Serve", "keys", "deploy.keys", "make an API key"),
    ("Everything", "demo", "pipelines.demo", "all stages on drawn shapes, on a CPU"),
)

MODULES = {command: module for _, command, module, _ in COMMANDS}
WITH_PRESETS = ("plan", "train", "refine", "sweep")

# Options and presets come from the help itself, which takes a quarter of a second. Files are completed by the shell.
COMPLETION = r"""
[ -z "$ZSH_VERSION" ] || { autoload -U +X bashcompinit && bashcompinit; }
_meanflow() {
    local current="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" preset= help=--help words=
    case " PRESET_COMMANDS " in *" $command "*) preset="${COMP_WORDS[2]}"; help=--help-all ;; esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="COMMANDS completion"
    elif [ "${current#-}" != "$current" ]; then
        words=$(meanflow "$command" $preset $help 2>/dev/null | grep -oE -e '--[a-z][a-z0-9._-]+')
    elif [ "$COMP_CWORD" -eq 2 ] && [ "$help" = --help-all ]; then
        words=$(meanflow "$command" --help 2>/dev/null | sed -nE '/^Presets/,$s/^    ([a-z0-9_]+) .*/\1/p')
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _meanflow meanflow
"""


def usage() -> str:
    """The commands in groups."""
    lines = [
        "usage: meanflow COMMAND [OPTIONS]",
        "",
        "One-step image generators: encode, train, evaluate, refine, serve. `meanflow COMMAND --help` lists the options.",
    ]
    group = None
    for name, command, _, what in COMMANDS:
        if name != group:
            lines += ["", f"{name}:"]
            group = name
        lines.append(f"  {command:13s} {what}")
    lines += [
        "",
        'Completion of commands, presets and options in bash and zsh: eval "$(meanflow completion)"',
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"meanflow-ray {importlib.metadata.version('meanflow-ray')}")
        return
    if arguments[0] == "completion":
        print(COMPLETION.replace("PRESET_COMMANDS", " ".join(WITH_PRESETS)).replace("COMMANDS", " ".join(MODULES)))
        return
    if arguments[0] not in MODULES:
        known = ", ".join(MODULES)
        print(f"error: {arguments[0]!r} is not a command; the commands are {known}", file=sys.stderr)
        raise SystemExit(2)
    # The user's folder comes last: its own modules are found (a preset module:function), and its `pipelines` is not.
    package_folder = str(Path(__file__).parents[1])
    given = [path for path in [os.environ.get("PYTHONPATH")] if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([package_folder, *given, os.getcwd()])
    sys.path += [package_folder, os.getcwd()]
    sys.argv = arguments
    runpy.run_module(MODULES[arguments[0]], run_name="__main__", alter_sys=True)
