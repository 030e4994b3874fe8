"""Talks to the router's native API: prints text as it comes, then what the request cost.

    python examples/grpc_client.py --router 127.0.0.1:50051 "Tell me a short story about a fox."
    python examples/grpc_client.py --router 127.0.0.1:50051 --plain "Once upon a time"

`pagewire serve` prints the router's address. The contract is protos/pagewire/v1/inference.proto.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc

ERROR_METADATA_KEY = "pagewire-error-bin"


def make_request(args: argparse.Namespace) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    if args.plain:
        return inference_pb2.GenerateRequest(text=args.prompt, sampling=sampling)
    message = inference_pb2.ChatMessage(role="user", content=args.prompt)
    return inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[message]), sampling=sampling)


def print_summary(summary: inference_pb2.Summary) -> None:
    way = f"prefill {summary.prefill_worker}, decode {summary.decode_worker}"
    if summary.lane:
        way += f", {summary.transferred_bytes} KV bytes over {summary.lane}"
    print(
        f"\n-- {summary.prompt_tokens} prompt tokens ({summary.cached_tokens} cached), "
        f"{summary.completion_tokens} new; first token after {summary.time_to_first_token_us / 1000:.1f} ms, "
        f"all after {summary.total_us / 1000:.1f} ms\n-- {way}"
    )


async def generate(args: argparse.Namespace) -> None:
    async with grpc.aio.insecure_channel(args.router) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for response in stub.Generate(make_request(args)):
            match response.WhichOneof("event"):
                case "delta":
                    print(response.delta.text, end="", flush=True)
                case "summary":
                    print_summary(response.summary)
                case "error":  # it failed after it had begun; before, the call itself fails
                    sys.exit(f"\n{response.error.message}")


def refusal(error: grpc.aio.AioRpcError) -> str:
    """The sentence of the Error that came with a refused call, or the bare status."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY:
            return common_pb2.Error.FromString(value).message
    return f"{error.code().name}: {error.details()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks a pagewire router over gRPC.")
    parser.add_argument("prompt")
    parser.add_argument("--router", required=True, metavar="HOST:PORT")
    parser.add_argument("--plain", action="store_true", help="continue the text instead of chatting")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    try:
        asyncio.run(generate(args))
    except grpc.aio.AioRpcError as error:
        sys.exit(refusal(error))


if __name__ == "__main__":
    main()
