"""A batch of documents in a file, answered as a job answers them."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.cluster import Cluster
from granite_ray.config import JobSection, SourceConfig
from granite_ray.errors import CorruptInputError, GraniteRayError
from granite_ray.io.sources import read_shard
from granite_ray.io.storage import OpenedStorages, Storage, open_storage
from granite_ray.planning import InputPlan, plan_input
from granite_ray.serving.answering import rows_schema
from granite_ray.serving.batch_store import Batch
from granite_ray.serving.batch_work import (
    PIECE_SIZE,
    Output,
    Unit,
    UnusableInputError,
    check_number,
)
from granite_ray.serving.documents import (
    DOCUMENT_PATHS,
    KINDS,
    jsonl_bytes,
    parquet_bytes,
)
from granite_ray.serving.files import file_format
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.questions import DocumentsRequest, Question


class DocumentWork:
    """A batch of documents in a file, read as a job reads it."""

    def __init__(self, gateway: Gateway, batch: Batch) -> None:
        self._gateway = gateway
        self._batch = batch
        about = gateway.files.get(batch.name, batch.input_file_id)
        storage = gateway.files.storage
        folder = gateway.files.folder(batch.name, batch.input_file_id)
        request = DocumentsRequest.model_validate(batch.question)
        kind = KINDS[DOCUMENT_PATHS.index(batch.endpoint)]
        self._question = Question(gateway, kind, request)
        self._source = SourceConfig(
            path=(f"{storage.root}/{folder}{about.filename}",),
            format=file_format(about.filename),
            text_column=request.text_column,
            id_column=request.id_column,
            keep_columns=tuple(request.keep_columns),
            documents_per_shard=PIECE_SIZE,
        )
        self._storages = OpenedStorages(open_storage)
        self._plan = _plan(self._source, self._question, self._storages, gateway)
        self._shards = {shard.shard_id: shard for shard in self._plan.shards}
        self.num_units = self._plan.num_documents
        check_number(self.num_units, gateway)
        self.pieces = [shard.shard_id for shard in self._plan.shards]

    async def answer_together(self, piece: str) -> Sequence[Any] | None:
        raw = await asyncio.to_thread(self._read, piece)
        return [await self._unit(raw)(False)]

    def units(self, piece: str) -> Sequence[Unit]:
        raw = self._read(piece)
        return [self._unit(raw.slice(row, 1)) for row in range(raw.num_rows)]

    def encode(self, piece: str, answers: Sequence[Any]) -> bytes:  # noqa: ARG002 - as the other
        return parquet_bytes(pa.concat_tables([self._empty(), *answers]))

    def count(self, data: bytes) -> tuple[int, int]:
        statuses = _table(data)["status"].to_pylist()
        return statuses.count("ok"), statuses.count("failed")

    def assemble(self, stored: Mapping[str, bytes], unfinished: str | None) -> Output:  # noqa: ARG002
        tables = [_table(stored[piece]) for piece in self.pieces if piece in stored]
        rows = pa.concat_tables([self._empty(), *tables])
        is_parquet = self._batch.output_format == "parquet"
        data = parquet_bytes(rows) if is_parquet else jsonl_bytes(rows)
        ending = "parquet" if is_parquet else "jsonl"
        return Output(data, f"{self._batch.batch_id}_output.{ending}")

    def _read(self, piece: str) -> pa.Table:
        storage: Storage = self._storages(self._plan.root)
        return read_shard(storage, self._shards[piece], self._plan.columns, self._source).table

    def _unit(self, raw: pa.Table) -> Unit:
        async def answer(is_deadly: bool) -> pa.Table:
            config, column = self._question.config, self._question.request.text_column
            return await self._gateway.answer(raw, config, column, is_deadly=is_deadly)

        return answer

    def _empty(self) -> pa.Table:
        keep_fields = self._plan.columns.keep_fields
        schema = rows_schema(self._question.task, keep_fields, self._gateway.model.name)
        return schema.remove_metadata().empty_table()


def _plan(
    source: SourceConfig, question: Question, storages: OpenedStorages, gateway: Gateway
) -> InputPlan:
    try:
        # A file within the limits is scanned here; Ray is never asked for it.
        cluster = Cluster(JobSection(), gateway.config.engine)
        return plan_input(source, sorted(question.columns.prompt_columns), storages, cluster)
    except CorruptInputError as error:
        raise UnusableInputError(["The file cannot be read in the format of its name."]) from error
    except GraniteRayError as error:
        if error.exit_code != 2:
            raise
        words = str(error).replace(source.path[0], "the file")
        raise UnusableInputError([words]) from error


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None)
