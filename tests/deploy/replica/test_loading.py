from deploy.replica.loading import load_model
from deploy.settings import Arguments


def test_model_info_identifies_the_loaded_weights(generator_folder, other_folder):
    first, again, second = (
        load_model(str(folder), Arguments(model="x", max_batch_size=1, served_name=name)).info
        for folder, name in ((generator_folder, None), (generator_folder, "mine"), (other_folder, None))
    )
    assert first.hashes == again.hashes
    assert first.hashes.transformer != second.hashes.transformer
    assert first.hashes.vae == second.hashes.vae
    assert (first.id, first.image_size, first.num_classes, first.supports_guidance) == ("first", 64, 10, False)
    assert again.id == "mine"
