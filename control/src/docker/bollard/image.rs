//! Building an image from a folder.

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

/// How long a build may take.
const BUILD_TIMEOUT: Duration = Duration::from_secs(1_800);
/// How much of the folder is on its way at a time: pieces, and bytes of each.
pub(super) const PIECES_MAX: usize = 4;
pub(super) const PIECE_BYTES: usize = 64 * 1_024;
/// How much of the end of Docker's output is told when a build fails: lines, and characters of each.
const LINES_MAX: usize = 8;
const LINE_CHARS_MAX: usize = 300;

impl Engine {
    /// Builds an image of this name.
    pub(in crate::docker) async fn build(&self, context: Context, image: &str) -> Result<(), DockerError> {
        let (sender, receiver) = mpsc::channel(PIECES_MAX);
        let dockerfile = context.dockerfile().to_string_lossy().into_owned();
        let options =
            BuildImageOptionsBuilder::default().dockerfile(&dockerfile).t(image).rm(true).forcerm(true);
        let writer = tokio::task::spawn_blocking(move || {
            let packed = context.write(BufWriter::with_capacity(PIECE_BYTES, Pieces(sender.clone())));
            if let Err(error) = &packed {
                // The engine must not take half a folder for a whole one.
                let _ = sender.blocking_send(Err(io::Error::other(error.to_string())));
            }
            packed
        });
        let pieces =
            unfold(receiver, |mut receiver| async { receiver.recv().await.map(|piece| (piece, receiver)) });
        let output = self.client.build_image(options.build(), None, Some(body_try_stream(pieces)));
        let built = tokio::time::timeout(BUILD_TIMEOUT, self.follow(output)).await.unwrap_or_else(|_| {
            Err(DockerError::Refused(format!("it took longer than {} s", BUILD_TIMEOUT.as_secs())))
        });
        let failed = |why: String| DockerError::Refused(format!("the image cannot be built: {why}"));
        match (built, writer.await) {
            (Ok(()), _) => Ok(()),
            // A folder that cannot be packed breaks the connection, which says less.
            (Err(_), Ok(Err(error))) if !is_hang_up(&error) => Err(failed(error.to_string())),
            (Err(DockerError::Refused(why)), _) => Err(failed(why)),
            (Err(error), _) => Err(error),
        }
    }

    /// Fetches an image from its registry.
    pub(in crate::docker) async fn pull(&self, image: &str) -> Result<(), DockerError> {
        let (repository, tag) = tagged(image);
        let options = match image.contains('@') {
            true => CreateImageOptionsBuilder::default().from_image(image),
            false => CreateImageOptionsBuilder::default().from_image(repository).tag(tag),
        };
        let mut told = Box::pin(self.client.create_image(Some(options.build()), None, None));
        let pulled = async {
            while let Some(told) = told.next().await {
                told.map_err(|error| self.refused(&error))?;
            }
            Ok(())
        };
        let late = || DockerError::Refused(format!("it took longer than {} s", BUILD_TIMEOUT.as_secs()));
        match tokio::time::timeout(BUILD_TIMEOUT, pulled).await.unwrap_or_else(|_| Err(late())) {
            Err(DockerError::Refused(why)) => Err(DockerError::Refused(format!(
                "the image {image} is not here and cannot be pulled: {why}"
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

    /// Reads what Docker says of a build to its end.
    async fn follow(
        &self,
        output: impl futures_util::Stream<Item = Result<BuildInfo, bollard::errors::Error>>,
    ) -> Result<(), DockerError> {
        let mut output = Box::pin(output);
        let mut lines: VecDeque<String> = VecDeque::new();
        while let Some(told) = output.next().await {
            match told {
                Ok(told) => {
                    let said = told.stream.unwrap_or_default();
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

/// Whether a folder was not sent because the engine ended the connection, for a reason that it gives itself.
fn is_hang_up(error: &ContextError) -> bool {
    matches!(error, ContextError::Write(error) if error.kind() == io::ErrorKind::BrokenPipe)
}

/// A name and its tag. The last colon begins the tag, unless it belongs to a registry's port.
fn tagged(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "latest"),
    }
}

/// Sends what is written.
pub(super) struct Pieces(pub(super) mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(Bytes::copy_from_slice(piece))).map_err(gone)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
