# %% [markdown]
# # A video from a picture, on Kaggle's eight TPU chips
#
# You give a picture and a sentence. CogVideoX-5B-I2V makes a six-second video that begins with your
# picture. Choose **Settings → Accelerator → TPU v5e-8** and **Settings → Internet on**, then
# **Run → Run all**, and look below the last cell.
#
# - **No TPU?** Then the notebook uses a small model, `cogi2v-tiny`. It knows only flat shapes, but
#   it shows in a minute how everything works.
# - **The first run is slow**: it downloads about 20 GB and converts them. Later runs on the same
#   machine find both.
# - **Session lost?** Choose **Run all** again. With **Settings → Persistence → Files only**, a
#   video that was sampled is not sampled again.
#
# **What has been tested:** all of this with the small model on a CPU. Nobody has run it on a real
# TPU yet. What is known about the large models there comes from Google's TPU compiler; step 2
# prints it.
#
# The weights of the large models have the CogVideoX licence: free for research, registration for
# commercial use.

# %% [markdown]
# ## 1. Install
# `source` is a package's name, a folder (`/kaggle/input/cogi2v-jax[tpu]`) or a git address
# (`cogi2v-jax[tpu] @ git+https://…`). If the program is installed, the cell does nothing. If Kaggle
# has an older numpy or jax in memory, the installation ends with a line that asks for a restart.

# %%
source = "cogi2v-jax[tpu]"

import importlib
import subprocess
import sys

from IPython.core.error import UsageError

try:
    import cogi2v_jax
except ImportError:
    # Kaggle has a TPU library (libtpu) for PyTorch, which is too old for jax's kernels; [tpu]
    # installs the right one.
    command = [sys.executable, "-m", "pip", "install", "--quiet", source]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        raise UsageError(f"pip cannot install {source}: {pip.stderr.strip()}") from None
    importlib.invalidate_caches()
    import cogi2v_jax
from cogi2v_jax.apps import preflight

# A platform may have imported its own numpy or jax before this cell. Only a new session can load
# those that were installed: the cell then stops here, and after the restart it goes on.
preflight.check_imports("choose Run → Restart & clear cell outputs, then Run → Run all")
print("cogi2v-jax", cogi2v_jax.__version__)

# %% [markdown]
# ## 2. Check the machine, choose the model
# `"auto"` is CogVideoX-5B-I2V if the machine can hold it, else the small model. Or choose one:
# `"cogvideox-5b-i2v"`, `"cogvideox1.5-5b-i2v"` (larger pictures, slower) or `"cogi2v-tiny"`. Red
# lines of `libtpu` only mean that there is no TPU.

# %%
wanted = "auto"

from pathlib import Path

# Stops here, and says why, if the machine can't hold the model that you chose.
model = preflight.check(wanted)
results = (Path("/kaggle/working") if Path("/kaggle/working").is_dir() else Path.home()) / "cogi2v"
results.mkdir(exist_ok=True)
print(f"{model}; results go to {results}")

# %% [markdown]
# ## 3. Picture and sentence
# `picture = None` is the example: a triangle, made for the small model. For your own picture,
# choose **Add Input → Upload** and give its path, such as `"/kaggle/input/my-photos/boat.jpg"`.
# Another seed gives another video. `None` is the model's default.

# %%
picture = None
prompt = "the cyan triangle grows"
negative_prompt = ""
seed = 42
num_inference_steps = None
guidance_scale = None
num_frames = None

from cogi2v_jax import Request, config, sample

# What the model can't compute is refused here, before anything slow.
request = Request(
    image=picture or sample.EXAMPLE_IMAGE,
    prompt=prompt,
    negative_prompt=negative_prompt,
    seed=seed,
    num_inference_steps=num_inference_steps,
    guidance_scale=guidance_scale,
    num_frames=num_frames,
).resolve(config.named(model))
size = f"{request.height}x{request.width}"
print(f"{request.num_frames} frames of {size}, {request.num_inference_steps} steps")

# %% [markdown]
# ## 4. Load the model
# A large model is downloaded and converted first, once on each machine. The released weights need
# no Hugging Face token; one in **Add-ons → Secrets**, named `HF_TOKEN`, is used.

# %%
import contextlib
import os

# There may be no such secret, or no permission to read it, or this is not Kaggle.
with contextlib.suppress(Exception):
    from kaggle_secrets import UserSecretsClient

    os.environ.setdefault("HF_TOKEN", UserSecretsClient().get_secret("HF_TOKEN"))
models = cogi2v_jax.load(model, say=print)
print(f"the weights are in {models.folder}, {models.dtype}")

# %% [markdown]
# ## 5. Sample
# The long part. The program is compiled for your machine before the first step. The result is saved
# before it is decoded; with the same settings again, the cell does nothing.

# %%
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

# %% [markdown]
# ## 6. Watch
# If step 5 stopped after sampling (out of memory, say), this decodes what it saved.

# %%
from IPython.display import Video

if not video_file.exists():
    latents, recipe = read_latents(latents_file)
    write_video(video_file, cogi2v_jax.decode(models, latents)[0], recipe["fps"], recipe)
print(video_file)
Video(str(video_file), embed=True, html_attributes="controls autoplay loop muted")
