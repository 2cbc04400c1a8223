"""Image classification with accelerate: own dataset, normalization in the loop, one-cycle schedule, checkpoints."""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor

import knowiso_train as ki  # + knowiso


class ImageFiles(Dataset):
    """Images of a folder with one folder per class."""

    def __init__(self, folder, class_to_index, transform):
        self.files = sorted(Path(folder).glob("*/*.png"))
        self.class_to_index, self.transform = class_to_index, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        file = self.files[index]
        image = self.transform(Image.open(file).convert("RGB"))
        return {"image": image, "label": self.class_to_index[file.parent.name]}


def training_function(args):
    """Train, evaluate after each epoch, and save the network."""
    output = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision=args.mixed_precision, log_with="tensorboard", project_dir=output
    )
    accelerator.init_trackers("logs")
    set_seed(args.seed)

    classes = sorted(path.name for path in Path(args.data_dir, "train").iterdir())
    class_to_index = {name: index for index, name in enumerate(classes)}
    train = ImageFiles(f"{args.data_dir}/train", class_to_index, Compose([RandomHorizontalFlip(), ToTensor()]))
    validation = ImageFiles(f"{args.data_dir}/validation", class_to_index, ToTensor())
    train_loader = DataLoader(train, shuffle=True, batch_size=args.batch_size, drop_last=True)
    validation_loader = DataLoader(validation, batch_size=args.batch_size)

    model = timm.create_model(args.model, num_classes=len(classes)).to(accelerator.device)
    mean = torch.tensor(model.default_cfg["mean"])[None, :, None, None].to(accelerator.device)
    std = torch.tensor(model.default_cfg["std"])[None, :, None, None].to(accelerator.device)

    teacher = timm.create_model("resnet10t", num_classes=len(classes), checkpoint_path="teacher.pth")  # + knowiso
    iso = ki.IsomorphismLoss(model, teacher.to(accelerator.device), ["layer2", "layer3"]).attach()  # + knowiso
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr / 25)
    steps = args.epochs * len(train_loader)
    scheduler = OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps)
    model, optimizer, train_loader, validation_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, validation_loader, scheduler
    )
    accelerator.register_for_checkpointing(iso)  # + knowiso

    step, first_epoch = 0, 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        first_epoch = int(Path(args.resume_from_checkpoint).name.removeprefix("epoch_")) + 1
        step = first_epoch * len(train_loader)

    for epoch in range(first_epoch, args.epochs):
        model.train()
        for batch in train_loader:
            images = (batch["image"] - mean) / std
            loss = F.cross_entropy(model(images), batch["label"])
            loss = loss + iso()  # + knowiso
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            accelerator.log({"train_loss": loss.item()}, step=step)
            accelerator.log(iso.log(), step=step)  # + knowiso

        model.eval()
        correct = 0
        for batch in validation_loader:
            with torch.no_grad():
                predictions = model((batch["image"] - mean) / std).argmax(dim=-1)
            predictions, labels = accelerator.gather_for_metrics((predictions, batch["label"]))
            correct += (predictions == labels).sum().item()
        accelerator.print(f"epoch {epoch}: accuracy {correct / len(validation):.4f}")
        accelerator.save_state(output / f"epoch_{epoch}")

    accelerator.save(accelerator.unwrap_model(model).state_dict(), output / "model.pth")
    accelerator.end_training()


def main():
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--resume_from_checkpoint")
    training_function(parser.parse_args())


if __name__ == "__main__":
    main()
