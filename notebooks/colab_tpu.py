# %% [markdown]
# # A video from a picture, on a free Colab TPU
#
# You give a picture and a sentence. CogVideoX-5B-I2V makes a six-second video that begins with your
# picture. Choose **Runtime → Change runtime type → v5e-1 TPU**, then **Runtime → Run all**, and
# look below the last cell.
#
# - **No TPU?** Then the notebook uses a small model, `cogi2v-tiny`. It knows only flat shapes, but
#   it shows in a minute how everything works.
# - **The first run is slow**: it downloads about 20 GB and converts them. Later runs on the same
#   machine find both.
# - **Machine lost?** Choose **Run all** again. If you ticked `keep_on_drive` in step 2, a video
#   that was sampled is not sampled again.
#
# **What has been tested:** all of this with the small model on a CPU. Nobody has run it on a real
# TPU yet. What is known about the large models there comes from Google's TPU compiler; step 2
# prints it.
#
# The weights of the large models have the CogVideoX licence: free for research, registration for
# commercial use.

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
# @title 2. Check the machine, choose the model
# @markdown `auto` is CogVideoX-5B-I2V if the machine can hold it, else the small model. Red lines
# @markdown of `libtpu` only mean that there is no TPU.
wanted = "auto"  # @param ["auto", "cogvideox-5b-i2v", "cogvideox1.5-5b-i2v", "cogi2v-tiny"]
# @markdown Keep pictures and videos in your Google Drive. Everything else is lost with the machine.
keep_on_drive = False  # @param {"type":"boolean"}

from pathlib import Path

# Stops here, and says why, if the machine can't hold the model that you chose.
model = preflight.check(wanted)
if keep_on_drive:
    from google.colab import drive

    drive.mount("/content/drive")
    results = Path("/content/drive/MyDrive/cogi2v")
else:
    results = (Path("/content") if Path("/content").is_dir() else Path.home()) / "cogi2v"
results.mkdir(exist_ok=True)
print(f"{model}; results go to {results}")

# %%
# @title 3. Picture and sentence
# @markdown The example is a triangle, made for the small model. `upload` asks for your own picture.
picture = "example"  # @param ["example", "upload", "the last upload"]
prompt = "the cyan triangle grows"  # @param {"type":"string"}
negative_prompt = ""  # @param {"type":"string"}
# @markdown Another seed gives another video. `None` is the model's default.
seed = 42  # @param {"type":"integer"}
num_inference_steps = None  # @param {"type":"raw"}
guidance_scale = None  # @param {"type":"raw"}
num_frames = None  # @param {"type":"raw"}

from cogi2v_jax import Request, config, sample

image = sample.EXAMPLE_IMAGE if picture == "example" else results / "picture"
if picture == "upload":
    from google.colab import files

    files.upload_file(str(image))
# What the model can't compute is refused here, before anything slow.
request = Request(
    image=image,
    prompt=prompt,
    negative_prompt=negative_prompt,
    seed=seed,
    num_inference_steps=num_inference_steps,
    guidance_scale=guidance_scale,
    num_frames=num_frames,
).resolve(config.named(model))
size = f"{request.height}x{request.width}"
print(f"{request.num_frames} frames of {size}, {request.num_inference_steps} steps")

# %%
# @title 4. Load the model
# @markdown A large model is downloaded and converted first, once on each machine. You need no
# @markdown Hugging Face token; if you have one, add it to Colab's secrets (the key on the left) as
# @markdown `HF_TOKEN`.
import contextlib
import os

# There may be no such secret, or no permission to read it, or this is not Colab.
with contextlib.suppress(Exception):
    from google.colab import userdata

    os.environ.setdefault("HF_TOKEN", userdata.get("HF_TOKEN"))
models = cogi2v_jax.load(model, say=print)
print(f"the weights are in {models.folder}, {models.dtype}")

# %%
# @title 5. Sample
# @markdown The long part. The program is compiled for your machine before the first step. The
# @markdown result is saved before it is decoded; with the same settings again, this does nothing.
import hashlib
import json

from tqdm import tqdm

from cogi2v_jax.media.recipe import LATENTS, read_latents, recipe_of, write_latents
from cogi2v_jax.media.videos import write_video

recipe = recipe_of(models, model, request)
stem = f"{model}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}"
latents_file, video_file = results / f"{stem}{LATENTS}", results / f"{stem}.mp4"
if latents_file.exists():
    print(f"sampled before: {latents_file}")
else:
    with tqdm(total=request.num_inference_steps, unit="step") as bar:
        result = cogi2v_jax.generate(
            models,
            request,
            on_step=lambda step, steps, latents: bar.update(),
            on_latents=lambda latents, _: write_latents(latents_file, latents, recipe),
        )
    write_video(video_file, result.video[0], request.fps, recipe)
    seconds = (f"{name} {value:.1f}" for name, value in result.seconds.items())
    print("seconds:", "  ".join(seconds))

# %%
# @title 6. Watch
# @markdown If step 5 stopped after sampling (out of memory, say), this decodes what it saved.
from IPython.display import Video

if not video_file.exists():
    latents, recipe = read_latents(latents_file)
    write_video(video_file, cogi2v_jax.decode(models, latents)[0], recipe["fps"], recipe)
print(video_file)
Video(str(video_file), embed=True, html_attributes="controls autoplay loop muted")
