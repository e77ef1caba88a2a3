# %% [markdown]
# # Teach the model a motion
#
# From clips to a LoRA to a video. The example teaches the small model, `cogi2v-tiny`, to move
# shapes in a circle, which it was never shown. Choose **Runtime → Run all**; without an accelerator
# it takes about twenty minutes, most of them in step 5.
#
# - **No time?** Set `number = 100` in step 3 and `steps = 60` in step 5, to see how everything
#   works.
# - **Your own clips?** Give their folder in step 3, each clip with its caption in a `.txt` beside
#   it, and a large model in step 2.
# - **Machine lost, or a cell stopped?** Choose **Run all** again: each step goes on where it was.
#
# **What has been tested:** all of this with the small model on a CPU. Shapes go round as they
# should, and lose some of their form. Nobody has trained a large model with it on a TPU yet.

# %%
# @title 1. Install
# @markdown `source` is a package's name, a folder (`/content/cogi2v-jax[tpu]`) or a git address
# @markdown (`cogi2v-jax[tpu] @ git+https://…`). If the program is installed, this does nothing.
# @markdown Colab has an older numpy in memory, so the installation ends with a line that asks for
# @markdown **Runtime → Restart session and run all**, once.
source = "cogi2v-jax[tpu]"  # @param {"type":"string"}

import importlib
import subprocess
import sys

from IPython.core.error import UsageError

try:
    import cogi2v_jax
except ImportError:
    command = [sys.executable, "-m", "pip", "install", "--quiet", source]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        raise UsageError(f"pip cannot install {source}: {pip.stderr.strip()}") from None
    importlib.invalidate_caches()
    import cogi2v_jax
from cogi2v_jax.apps import preflight

# A platform may have imported its own numpy or jax before this cell. Only a new session can load
# those that were installed: the cell then stops here, and after the restart it goes on.
preflight.check_imports("choose Runtime → Restart session and run all")
print("cogi2v-jax", cogi2v_jax.__version__)

# %%
# @title 2. Choose the model
# @markdown What is checked for a large model is whether the machine can sample with it. What
# @markdown training takes there stands below, by the TPU compiler's account; none was measured.
wanted = "cogi2v-tiny"  # @param ["cogi2v-tiny", "cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"]
# @markdown Clips, LoRA and videos go to this folder of the results.
name = "circles"  # @param {"type":"string"}

from pathlib import Path

model = preflight.check(wanted)
preflight.say_training(model)
results = (Path("/content") if Path("/content").is_dir() else Path.home()) / "cogi2v" / name
results.mkdir(parents=True, exist_ok=True)
recipe = {
    "cogi2v-tiny": "lora-tiny",
    "cogvideox-5b-i2v": "lora-5b",
    "cogvideox1.5-5b-i2v": "lora-1.5-5b",
}[model]
print(f"{model}, {recipe}; results go to {results}")

# %%
# @title 3. Clips
# @markdown `example` draws clips of shapes: half of them go round, the others do what the model
# @markdown knows, so that it does not forget that. Or give a folder of videos with captions, a
# @markdown `.csv` or a `.jsonl` with the columns `video` and `caption`.
clips = "example"  # @param {"type":"string"}
number = 1600  # @param {"type":"integer"}

from cogi2v_jax.training import shapes


def finish(program, *arguments):
    """Runs a command of the package in this process; what is wrong stands above its line."""
    if program([str(argument) for argument in arguments]):
        raise preflight.Unfit("stopped: the reason is above. This cell again goes on")


if clips == "example":
    clips = results / "clips"
    motions = [motion for known in shapes.TRAINED for motion in ("circles", known)]
    if not clips.exists():
        finish(shapes.main, clips, "--clips", number, "--seed", 3, "--motions", *motions)

# %%
# @title 4. Prepare
# @markdown The VAE and T5 encode every clip and caption once. With the same clips again, this does
# @markdown nothing.
from cogi2v_jax import prepare

finish(prepare.main, clips, results / "data", "--model", model)

# %%
# @title 5. Train
# @markdown The long part. `None` is what the recipe says. Interrupted, the cell goes on from the
# @markdown last checkpoint. By the TPU compiler a rank of 128 fits one v5e chip beside int8 weights
# @markdown (`cogi2v-convert to-flax --dtype int8` makes them); beside bfloat16 ones take 16, which
# @markdown was not compiled yet.
steps = None  # @param {"type":"raw"}
rank = None  # @param {"type":"raw"}

from cogi2v_jax import train

changes = [f"data={results / 'data'}", f"output={results / 'lora'}", f"model={model}"]
changes += [f"{key}={value}" for key, value in (("steps", steps), ("rank", rank)) if value]
finish(train.main, recipe, *changes)
print(f"the LoRA is {results / 'lora' / 'pytorch_lora_weights.safetensors'}")

# %%
# @title 6. Watch
# @markdown The same picture and sentence without the LoRA and with it.
picture = "example"  # @param {"type":"string"}
prompt = "the cyan triangle circles"  # @param {"type":"string"}

import base64

from IPython.display import HTML

from cogi2v_jax import Request, sample
from cogi2v_jax.media.recipe import recipe_of
from cogi2v_jax.media.videos import write_video

request = Request(sample.EXAMPLE_IMAGE if picture == "example" else picture, prompt)
models = cogi2v_jax.load(model, say=print)
adapters = {"without": [], "with": [results / "lora"]}
figures = []
for title, loras in adapters.items():
    cogi2v_jax.adapt(models, loras, say=print)
    made = cogi2v_jax.generate(models, request)
    file = results / f"{title}.mp4"
    write_video(file, made.video[0], made.request.fps, recipe_of(models, model, made.request))
    data = base64.b64encode(file.read_bytes()).decode()
    video = f'<video src="data:video/mp4;base64,{data}" controls autoplay loop muted width=256>'
    figures.append(f"<figure><figcaption>{title}</figcaption>{video}</video></figure>")
print(*(str(results / f"{title}.mp4") for title in adapters), sep="\n")
HTML(f'<div style="display: flex; flex-wrap: wrap">{"".join(figures)}</div>')
