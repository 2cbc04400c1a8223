"""Vision transformer in a loop of accelerate: accumulation, weight decay by groups, checkpoints amid an epoch."""

import argparse
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, get_scheduler

import knowiso_train as ki  # + knowiso


def parse_args():
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_dir", required=True)
    parser.add_argument("--validation_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--hidden_size", type=int, default=32)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--lr_scheduler_type", default="linear")
    parser.add_argument("--num_warmup_steps", type=int, default=4)
    parser.add_argument("--checkpointing_steps", type=int)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main():
    """Train, evaluate after each epoch, and save."""
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard",
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    files = {"train": f"{args.train_dir}/**", "validation": f"{args.validation_dir}/**"}
    dataset = load_dataset("imagefolder", data_files=files, drop_labels=False)
    labels = dataset["train"].features["label"].names

    config = AutoConfig.for_model(
        "vit",
        image_size=32,
        patch_size=8,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = AutoModelForImageClassification.from_config(config)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})

    normalize = Normalize(processor.image_mean, processor.image_std)
    augment = Compose([Resize((32, 32)), RandomHorizontalFlip(), ToTensor(), normalize])
    resize = Compose([Resize((32, 32)), ToTensor(), normalize])

    def preprocess_train(batch):
        batch["pixel_values"] = [augment(image.convert("RGB")) for image in batch["image"]]
        return batch

    def preprocess_validation(batch):
        batch["pixel_values"] = [resize(image.convert("RGB")) for image in batch["image"]]
        return batch

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    train_dataset = dataset["train"].with_transform(preprocess_train)
    validation_dataset = dataset["validation"].with_transform(preprocess_validation)
    batch_size = args.per_device_train_batch_size
    train_dataloader = DataLoader(train_dataset, shuffle=True, collate_fn=collate_fn, batch_size=batch_size)
    validation_dataloader = DataLoader(validation_dataset, collate_fn=collate_fn, batch_size=batch_size)

    teacher = AutoModelForImageClassification.from_pretrained("teacher").to(accelerator.device)  # + knowiso
    iso = ki.IsomorphismLoss(model, teacher, ["vit.layers.1", "vit.layers.2"]).attach()  # + knowiso
    no_decay = ["bias", "layernorm"]
    parameters = list(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in parameters if not any(part in name for part in no_decay)],
            "weight_decay": args.weight_decay,
        },
        {"params": [p for name, p in parameters if any(part in name for part in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    updates_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_train_epochs * updates_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.num_warmup_steps, num_training_steps=max_train_steps
    )
    model, optimizer, train_dataloader, validation_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, validation_dataloader, lr_scheduler
    )
    accelerator.register_for_checkpointing(iso)  # + knowiso
    accelerator.init_trackers("logs")

    completed_steps, starting_epoch, resume_step = 0, 0, None
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        completed_steps = int(Path(args.resume_from_checkpoint).name.removeprefix("step_"))
        batches = completed_steps * args.gradient_accumulation_steps
        starting_epoch, resume_step = divmod(batches, len(train_dataloader))

    for epoch in range(starting_epoch, args.num_train_epochs):
        model.train()
        active_dataloader = train_dataloader
        if resume_step is not None and epoch == starting_epoch:
            train_dataloader.set_epoch(epoch)
            active_dataloader = skip_first_batches(train_dataloader, resume_step)
        for batch in active_dataloader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = outputs.loss
                loss = loss + iso()  # + knowiso
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                completed_steps += 1
                accelerator.log({"train_loss": loss.item()}, step=completed_steps)
                accelerator.log(iso.log(), step=completed_steps)  # + knowiso
                if args.checkpointing_steps and completed_steps % args.checkpointing_steps == 0:
                    accelerator.save_state(Path(args.output_dir, f"step_{completed_steps}"))

        model.eval()
        correct, total = 0, 0
        for batch in validation_dataloader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            correct, total = correct + (predictions == references).sum().item(), total + len(references)
        accelerator.log({"accuracy": correct / total}, step=completed_steps)

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    Path(args.output_dir, "all_results.json").write_text(json.dumps({"eval_accuracy": correct / total}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
