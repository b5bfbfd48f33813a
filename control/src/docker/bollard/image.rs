//! Builds an image from a folder, and pulls images.

use std::collections::VecDeque;
use std::io::{self, BufWriter, Write};
use std::time::Duration;

use bollard::query_parameters::{
    BuildImageOptionsBuilder, CreateImageOptionsBuilder, TagImageOptionsBuilder,
};
use bollard::{body_try_stream, models::BuildInfo};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::unfold;
use tokio::sync::mpsc;

use super::{Context, DockerError, Engine};
use crate::docker::context::ContextError;
use crate::model::name::escape;

/// The time limit of a build.
const BUILD_TIMEOUT: Duration = Duration::from_secs(1_800);
/// The maximum amount of the context in flight: the number of chunks, and the bytes of each.
pub(super) const CHUNKS_MAX: usize = 4;
pub(super) const CHUNK_BYTES: usize = 64 * 1_024;
/// The maximum amount of the last output in the error of a build: lines, and characters of each.
const LINES_MAX: usize = 8;
const LINE_CHARS_MAX: usize = 300;

impl Engine {
    /// Builds an image with this name.
    pub(in crate::docker) async fn build(&self, context: Context, image: &str) -> Result<(), DockerError> {
        let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
        let dockerfile = context.dockerfile().to_string_lossy().into_owned();
        let options =
            BuildImageOptionsBuilder::default().dockerfile(&dockerfile).t(image).rm(true).forcerm(true);
        let writer = tokio::task::spawn_blocking(move || {
            let packed = context.write(BufWriter::with_capacity(CHUNK_BYTES, ChunkWriter(sender.clone())));
            if let Err(error) = &packed {
                // The error makes the engine reject the incomplete context.
                let _ = sender.blocking_send(Err(io::Error::other(error.to_string())));
            }
            packed
        });
        let chunks =
            unfold(receiver, |mut receiver| async { receiver.recv().await.map(|chunk| (chunk, receiver)) });
        let output = self.client.build_image(options.build(), None, Some(body_try_stream(chunks)));
        let built = tokio::time::timeout(BUILD_TIMEOUT, self.follow(output)).await.unwrap_or_else(|_| {
            Err(DockerError::Refused(format!("it took longer than {} s", BUILD_TIMEOUT.as_secs())))
        });
        let failed = |why: String| DockerError::Refused(format!("the image cannot be built: {why}"));
        match (built, writer.await) {
            (Ok(()), _) => Ok(()),
            // A failure to pack the folder breaks the connection, whose error says less.
            (Err(_), Ok(Err(error))) if !is_hang_up(&error) => Err(failed(error.to_string())),
            (Err(DockerError::Refused(why)), _) => Err(failed(why)),
            (Err(error), _) => Err(error),
        }
    }

    /// Pulls an image from its registry.
    pub(in crate::docker) async fn pull(&self, image: &str) -> Result<(), DockerError> {
        let (repository, tag) = tagged(image);
        let options = match image.contains('@') {
            true => CreateImageOptionsBuilder::default().from_image(image),
            false => CreateImageOptionsBuilder::default().from_image(repository).tag(tag),
        };
        let mut answer = Box::pin(self.client.create_image(Some(options.build()), None, None));
        let pulled = async {
            while let Some(answer) = answer.next().await {
                answer.map_err(|error| self.refused(&error))?;
            }
            Ok(())
        };
        let timeout_error =
            || DockerError::Refused(format!("it took longer than {} s", BUILD_TIMEOUT.as_secs()));
        match tokio::time::timeout(BUILD_TIMEOUT, pulled).await.unwrap_or_else(|_| Err(timeout_error())) {
            Err(DockerError::Refused(why)) => Err(DockerError::Refused(format!(
                "the engine does not have the image {image}, and it cannot be pulled: {why}"
            ))),
            done => done,
        }
    }

    /// Gives an image a name.
    pub(super) async fn tag(&self, image: &str, name: &str) -> Result<(), DockerError> {
        let (repository, tag) = tagged(name);
        let options = TagImageOptionsBuilder::default().repo(repository).tag(tag).build();
        self.client.tag_image(image, Some(options)).await.map_err(|error| self.refused(&error))
    }

    /// Reads Docker's output of a build until its end.
    async fn follow(
        &self,
        output: impl futures_util::Stream<Item = Result<BuildInfo, bollard::errors::Error>>,
    ) -> Result<(), DockerError> {
        let mut output = Box::pin(output);
        let mut lines: VecDeque<String> = VecDeque::new();
        while let Some(answer) = output.next().await {
            match answer {
                Ok(answer) => {
                    let said = answer.stream.unwrap_or_default();
                    for line in said.lines().map(str::trim).filter(|line| !line.is_empty()) {
                        lines.push_back(escape(line).chars().take(LINE_CHARS_MAX).collect());
                        if lines.len() > LINES_MAX {
                            lines.pop_front();
                        }
                    }
                }
                Err(error) => {
                    let why = self.refused(&error);
                    return Err(match why {
                        DockerError::Refused(why) if !lines.is_empty() => {
                            let said = Vec::from(lines).join(" | ");
                            DockerError::Refused(format!("{} (Docker said: {said})", escape(why.trim())))
                        }
                        why => why,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Returns whether sending a folder failed because the engine closed the connection; the engine's own error has the reason.
fn is_hang_up(error: &ContextError) -> bool {
    matches!(error, ContextError::Write(error) if error.kind() == io::ErrorKind::BrokenPipe)
}

/// Splits a name into repository and tag. The last colon starts the tag, unless it is part of a registry's port.
fn tagged(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "latest"),
    }
}

/// A writer that sends its input as chunks.
pub(super) struct ChunkWriter(pub(super) mpsc::Sender<io::Result<Bytes>>);

impl Write for ChunkWriter {
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(Bytes::copy_from_slice(chunk))).map_err(gone)?;
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
