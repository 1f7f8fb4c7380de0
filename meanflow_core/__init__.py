"""MeanFlow: one network call from noise to image (Geng, Deng, Bai, Kolter, He 2025, arXiv 2505.13447).

A flow carries noise (t = 1) to data (t = 0) along z_t = (1 - t) x + t e, with velocity v = dz/dt. Flow matching learns
v and integrates it in many steps. MeanFlow learns the *average* velocity of the stretch from r to t,

    u(z_t, r, t) = 1 / (t - r) * integral of v(z_s, s) ds for s from r to t,

so that z_r = z_t - (t - r) u, exactly and in one step. Differentiating (t - r) u with respect to t gives the MeanFlow
identity, u = v - (t - r) du/dt, with the total derivative du/dt = v du/dz + du/dt|_z: one Jacobian-vector product.
Training regresses the network onto the right-hand side, held constant.

Read in this order:
    config         what a training run is, as frozen dataclasses;  presets: the published ones
    latents        image -> moments -> latent;  autoencoder: the VAE at both ends
    dual           pairs (value, tangent), on which the networks are written
    transformer    the network u(z_t, r, t, label), a DiT;  imf_transformer: improved MeanFlow's;  networks: by name
    time_sampling  how t and r are drawn;  loss: the step's record and the objectives
    training       one optimiser step, and the exponential moving averages;  sharding: over many devices
    pipeline       MeanFlowPipeline: a diffusers pipeline from noise to image
    generator      a generator's folder: made, found, opened;  portable: with its code inside
    interop        public checkpoints -> our parameters
    metrics        statistics of features, and the distances between them

Conventions throughout: B batch, C channels, H W latent height and width; t = 0 is data, t = 1 is noise; t >= r.
"""
