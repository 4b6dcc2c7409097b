"""What the tests of models share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def sentence_encoder():
    """Texts as random vectors: what matters here is what is made of them."""

    class Encoder:
        def encode(self, texts, batch_tokens=8192):
            return torch.randn(len(texts), 12, generator=torch.Generator().manual_seed(0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_llm.model.allmrec.load_sentence_encoder", lambda name, device: Encoder())
        yield


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """A folder with a random BERT of two layers, of single letters and a few words."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "the", "story"]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = transformers.BertConfig(vocab_size=len(pieces), max_position_embeddings=64, initializer_range=0.2, **sizes)
        transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder with the dataset ``chain``, as small as runs of the command line can do with."""
    from recbole_llm.data.prepare import generate_chain

    folder = tmp_path_factory.mktemp("small")
    generate_chain(folder, "chain", users=20, items=30, seed=1, noise=0.1, lengths=(5, 9))
    return folder


@pytest.fixture(scope="session")
def contract_settings(tmp_path_factory, text_encoder):
    """Settings of a run as small as can be, on rated data. All models share the folder, and so a teacher trained once."""
    import numpy as np

    from recbole_llm.data.prepare import generate_chain

    folder = tmp_path_factory.mktemp("contract")
    file = generate_chain(folder, "chain", users=12, items=15, seed=1, noise=0.1, lengths=(6, 9)) / "chain.inter"
    header, *lines = file.read_text().splitlines()
    ratings = np.random.default_rng(0).integers(1, 6, len(lines))
    rated = [f"{line}\t{rating}" for line, rating in zip(lines, ratings, strict=True)]
    file.write_text("\n".join([f"{header}\trating:float", *rated]) + "\n")
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "backbone": "tiny",
        "backbone_dtype": "float32",
        "head_hidden_size": 8,
        "representation_size": 8,
        "item_projection_hidden_size": 8,
        "latent_size": 8,
        "sentence_encoder": text_encoder,
        "hidden_size": 8,
        "n_layers": 1,
        "alignment_epochs": 1,
        "train_targets": "last",
        "train_candidates": 4,
        "train_negatives": 3,
        "train_batch_size": 5,
        "accumulation_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "epochs": 2,
        "eval_step": 1,
        "topk": [1, 3],
        "show_progress": False,
        "use_gpu": False,
        "teacher_settings": {"epochs": 1, "hidden_size": 8, "inner_size": 8, "n_layers": 1, "train_batch_size": 64},
    }
