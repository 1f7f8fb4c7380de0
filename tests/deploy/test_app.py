import asyncio
import inspect

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deploy.app import RemoteGenerator, build_app
from deploy.messages import GeneratorStatus
from deploy.settings import Arguments


class FailingHandle:
    """A deployment handle whose every call fails."""

    def __init__(self, error):
        self.generate = self.describe = self.list_classes = self
        self.error = error

    async def remote(self, *_):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ActorDiedError(), 503, "replica_died"),
        (ActorUnavailableError("unavailable", None), 503, "replica_died"),
        (BackPressureError(num_queued_requests=3, max_queued_requests=3), 429, "overloaded"),
        (DeploymentUnavailableError.__new__(DeploymentUnavailableError), 503, "not_ready"),
    ],
)
def test_ray_errors_become_refusals(error, status, code):
    if isinstance(error, DeploymentUnavailableError):
        error.__dict__.update(_deployment_id="g")
    generator = RemoteGenerator(FailingHandle(error))
    refusal = asyncio.run(generator.generate(None))
    assert (refusal.status, refusal.code) == (status, code)
    assert refusal.retry_after_seconds > 0
    problem = f"no replica of the generator responds: {type(error).__name__}"
    assert asyncio.run(generator.describe()) == GeneratorStatus(model=None, problem=problem)
    assert asyncio.run(generator.list_classes()) == []


@pytest.mark.parametrize("topology", ["one", "two"])
def test_the_application_resolves_the_model_once_and_sets_drain_times(generator_folder, monkeypatch, topology):
    monkeypatch.chdir(generator_folder.parent)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        build_app(Arguments(model="nowhere"))
    app = build_app(Arguments(model=generator_folder.name, topology=topology, num_replicas=3, drain_seconds=9.0))
    ingress = app._bound_deployment
    generator = ingress.init_args[0]._bound_deployment if topology == "two" else ingress
    for deployment in (generator, ingress):
        arguments = deployment.init_args[-1]
        assert arguments.model == str(generator_folder)
        # Serve calls reconfigure, which loads the model, only if there is a user_config or the method takes a rank. The rank
        # is for config files with an empty `user_config:`, which replaces this one (test_live starts with such a config).
        assert deployment.user_config == {}
        assert "rank" in inspect.signature(deployment.func_or_class.reconfigure).parameters
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 9.0
    assert generator.num_replicas == 3
