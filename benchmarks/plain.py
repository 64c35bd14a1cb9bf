"""One training step of LLB, written out plainly: what the fast paths of `llb` are measured against.

It does what a first, straightforward program does, and what the published one is known to do: every block of the
backbone and its class head run although only one block's output is used, every block's output is cloned and kept, the
loss and its terms are read back to the host in each step, and everything is float32. The model is the same;
tests/test_step.py checks that its loss and gradients are those of `llb`.
"""
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, softmax


class PlainBlock(nn.Module):
    "A pre-norm transformer block."
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class PlainLLB(nn.Module):
    "A frozen ViT, latent objects, label-focused blocks; `forward` returns everything that was kept."
    def __init__(self, dim=768, heads=12, depth=12, image=224, patch=16, classes=1000, objects=2048, layers=6,
                 target=11, temperature=.1):
        super().__init__()
        self.target, self.temperature = target, temperature
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * .02)
        self.vit = nn.ModuleList(PlainBlock(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        for p in self.parameters(): p.requires_grad_(False)
        self.visual_block = PlainBlock(dim, heads)
        self.assign = nn.Linear(dim, objects)
        self.embeddings = nn.Parameter(nn.init.xavier_normal_(torch.empty(objects, dim)))
        self.label_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.label_blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in range(layers - 1))
        self.label_norm, self.label_head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, images, labels, diversity_weight=.5):
        x, kept = self.patches(images).flatten(2).transpose(1, 2), []
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.vit:
            x = block(x)
            kept.append(x.clone())
        visual_logits = self.head(self.norm(x)[:, 0])
        x = self.visual_block(kept[self.target - 1])
        kept.append(x.clone())
        assignments = softmax(self.assign(x[:, 1:]) / self.temperature, -1)
        x = torch.cat([self.label_token.expand(len(x), -1, -1), assignments @ self.embeddings], 1)
        for block in self.label_blocks:
            x = block(x)
            kept.append(x.clone())
        label_logits = self.label_head(self.label_norm(x)[:, 0])
        mean = assignments.mean((0, 1))
        entropy = -(mean * mean.log()).sum()
        ce = cross_entropy(label_logits, labels)
        return {"loss": ce - diversity_weight * entropy, "cross_entropy": ce, "entropy": entropy,
                "visual_logits": visual_logits, "label_logits": label_logits}


def plain_step(model, optimizer, images, labels, amp=False):
    "One optimizer step; the numbers of a progress line, read back. `amp` is the release's: float16, unscaled loss."
    with torch.autocast(images.device.type, torch.float16, enabled=amp): out = model(images, labels)
    shown = out["loss"].item(), out["cross_entropy"].item(), out["entropy"].item()
    optimizer.zero_grad()
    out["loss"].backward()
    optimizer.step()
    return shown
