"""Training: of Moshi, of codecs and of language models. Names are imported on first use."""

from ..lazy_names import lazy_names

_PUBLIC = {
    "codec.configuration": ["CodecTrainingConfig"],
    "codec.trainer": ["CodecTrainer"],
    "configuration": [
        "ConfigurationError",
        "DataConfig",
        "DistributedConfig",
        "MeshConfig",
        "ModelConfig",
        "RunConfig",
        "TrainingConfig",
        "build_configuration",
        "load_configuration",
    ],
    "data.loading": ["Loader", "WorkerError", "make_loader"],
    "data.prepared": ["Conversation", "PreparedDataset", "open_dataset"],
    "data.preparing": ["prepare"],
    "mesh": [
        "batch_sharding",
        "initialize_distributed",
        "make_mesh",
        "put_batch",
        "put_state",
        "state_shardings",
    ],
    "objective": ["ObjectiveConfig", "metrics_of", "objective_loss", "weight_totals"],
    "optimizer": ["OptimizerConfig", "make_optimizer", "make_schedule"],
    "run_checkpoints": ["DamagedCheckpointError"],
    "run_folder": ["export_checkpoint"],
    "scanned_layers": ["stack_layers", "unstack_layers"],
    "train_state": ["TrainState", "create_train_state", "merge_params", "split_params"],
    "train_step": ["make_eval_step", "make_train_step"],
    "text.configuration": ["TextTrainingConfig"],
    "trainer": ["Interrupted", "NotFiniteError", "Trainer", "make_trainer"],
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _PUBLIC)
