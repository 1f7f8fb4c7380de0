"""MeanFlow: one network call from noise to image (Geng, Deng, Bai, Kolter, He 2025, arXiv 2505.13447).

A flow transports noise (t = 1) to data (t = 0) along z_t = (1 - t) x + t e, with velocity v = dz/dt. Flow matching
learns v and integrates it in many steps. MeanFlow learns the *average* velocity between r and t,

    u(z_t, r, t) = 1 / (t - r) * integral of v(z_s, s) ds for s from r to t,

so that z_r = z_t - (t - r) u exactly, in one step. Differentiating (t - r) u with respect to t gives the MeanFlow
identity, u = v - (t - r) du/dt. The total derivative du/dt is one Jacobian-vector product: the derivative of u along
(dz, dt, dr) = (v, 1, 0). Training regresses the network onto the right-hand side, held constant.

Suggested reading order:
    config                   the configuration of a training run, as frozen dataclasses
    presets                  the papers' configurations, a module per family
    latents                  image -> moments -> latent
    autoencoder              the VAE: loading, encoding, decoding
    networks.interface       the inputs and outputs of a network
    networks.dual            tensors with tangents, the inputs and outputs of every layer
    networks.dit             MeanFlow's network u(z_t, r, t, label), a DiT
    networks.improved_dit    improved MeanFlow's network
    networks.forward_mode    any torch.nn.Module as a network
    networks.building        builds a network from its configuration
    objectives.interface     what an objective is
    objectives.draws         the random draws of a training step
    objectives.row_plan      which samples need which forward
    objectives.guidance      guided velocities, guards and weights
    objectives.flow          the training forward with du/dt, and metrics
    objectives.meanflow      flow matching, MeanFlow and improved MeanFlow
    objectives.alpha_flow    alpha-Flow and SoFlow
    objectives.consistency   consistency training, continuous and discrete
    objectives.diffusion     DDPM
    optimizers               Adam, AdamW and Muon
    training                 one optimiser step, and the moving averages of the parameters
    sharding                 training on many devices
    checkpoint               training state on disk
    predictions              what networks predict
    sampling                 noise and times of sampling
    pipeline                 MeanFlowPipeline: a diffusers pipeline from noise to images
    generator_folder         generator folders, without torch: find, settings, origin
    generator                generators: build, save, load
    portable                 generator folders that contain the code that they need
    interop                  public checkpoints -> our networks
    metrics                  feature statistics, distances and scores

Conventions: B batch, C channels, H W latent height and width; t = 0 is data, t = 1 is noise; t >= r.
"""
