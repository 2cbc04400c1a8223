"""Image classification with the Trainer of transformers: image folder, image processor, checkpoints."""

from dataclasses import dataclass, field

import torch
import transformers
from datasets import load_dataset
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    HfArgumentParser,
    TrainingArguments,
)

import knowiso_train as ki  # + knowiso
from knowiso_train.integrations.transformers import IsomorphismTrainer  # + knowiso


@dataclass
class DataTrainingArguments:
    """Arguments of data and network."""

    train_dir: str = field()
    validation_dir: str = field()
    width: int = field(default=16, metadata={"help": "channels of the first stage"})


def main():
    """Train, evaluate and save."""
    data_args, training_args = HfArgumentParser(
        (DataTrainingArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    transformers.set_seed(training_args.seed)
    files = {"train": f"{data_args.train_dir}/**", "validation": f"{data_args.validation_dir}/**"}
    dataset = load_dataset("imagefolder", data_files=files, drop_labels=False)
    labels = dataset["train"].features["label"].names

    config = AutoConfig.for_model(
        "resnet",
        embedding_size=data_args.width,
        hidden_sizes=[data_args.width * factor for factor in (1, 2, 4)],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = AutoModelForImageClassification.from_config(config)
    processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)

    normalize = Normalize(processor.image_mean, processor.image_std)
    side = processor.size["shortest_edge"]
    augment = Compose([Resize((side, side)), RandomHorizontalFlip(), ToTensor(), normalize])
    resize = Compose([Resize((side, side)), ToTensor(), normalize])

    def transform_with(transform):
        def apply(batch):
            batch["pixel_values"] = [transform(image.convert("RGB")) for image in batch["image"]]
            return batch

        return apply

    dataset["train"].set_transform(transform_with(augment))
    dataset["validation"].set_transform(transform_with(resize))

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    teacher = AutoModelForImageClassification.from_pretrained("teacher").to(training_args.device)  # + knowiso
    iso = ki.IsomorphismLoss(model, teacher, ["resnet.encoder.stages.1", "resnet.encoder.stages.2"])  # + knowiso
    trainer = IsomorphismTrainer(  # + knowiso, for: trainer = transformers.Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=processor,
        data_collator=collate_fn,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())},
        iso=iso,  # + knowiso
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
