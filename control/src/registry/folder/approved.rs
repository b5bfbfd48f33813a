//! Permission to run the commands of a folder, as a value: a [`Command`](super::Command) cannot be made without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use super::{Folder, FolderError, settings};
use crate::model::registration::Registration;
use crate::model::trust::{ContentDigest, FolderFile};
use crate::registry::trust_file::{NotTrusted, TrustFile};
use crate::sys::paths::Home;

/// The approvals of a home, and when they change. Clones share the notification.
#[derive(Clone, Debug)]
pub struct Approvals {
    file: TrustFile,
    changed: Arc<watch::Sender<()>>,
}

impl Approvals {
    /// The approvals of `home`.
    pub fn of(home: &Home) -> Approvals {
        Approvals { file: TrustFile::of(home), changed: Arc::new(watch::Sender::new(())) }
    }

    /// The file of the approvals.
    pub fn file(&self) -> &TrustFile {
        &self.file
    }

    /// Has each command that runs check its approval again.
    pub fn notify_changed(&self) {
        self.changed.send_replace(());
    }

    /// [`settings`], on a thread that may wait for a disk.
    ///
    /// # Errors
    /// Those of [`settings`].
    pub async fn settings(&self, registration: &Arc<Registration>) -> Result<Approved, FolderError> {
        let (approvals, registration) = (self.clone(), Arc::clone(registration));
        let work = tokio::task::spawn_blocking(move || settings(&registration, &approvals));
        work.await.unwrap_or_else(|error| Err(FolderError::File(format!("was not read: {error}"))))
    }
}

/// The settings of a folder, approved when this value was made.
#[derive(Clone, Debug)]
pub struct Approved {
    settings: Folder,
    /// Absent where the folder configures nothing.
    basis: Option<Basis>,
}

/// What was approved.
#[derive(Clone, Debug)]
pub(super) struct Basis {
    folder: PathBuf,
    text: Arc<str>,
    content: ContentDigest,
    approvals: Approvals,
}

impl Approved {
    pub(super) fn new(settings: Folder, folder: PathBuf, text: &str, approvals: &Approvals) -> Approved {
        let content = ContentDigest::of(text.as_bytes());
        let basis = Basis { folder, text: text.into(), content, approvals: approvals.clone() };
        Approved { settings, basis: Some(basis) }
    }

    /// The settings of a folder without a file.
    pub(super) fn nothing() -> Approved {
        Approved { settings: Folder::default(), basis: None }
    }

    /// The settings.
    pub fn settings(&self) -> &Folder {
        &self.settings
    }

    pub(super) fn basis(&self) -> Option<&Basis> {
        self.basis.as_ref()
    }
}

impl Basis {
    /// The canonical folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The approved text.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether the approval still holds. Reads small files.
    pub(super) async fn check(&self) -> Result<(), NotTrusted> {
        let own = self.clone();
        let check = move || own.approvals.file.check(&own.folder, FolderFile::Settings, &own.content);
        // The runtime ends.
        tokio::task::spawn_blocking(check).await.unwrap_or(Err(NotTrusted::NotApproved))
    }

    /// Notifications from now on, for [`Basis::revoked`].
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.approvals.changed.subscribe()
    }

    /// Returns when a notification comes and the approval no longer holds.
    pub(super) async fn revoked(&self, mut changes: watch::Receiver<()>) -> NotTrusted {
        // The sender lives as long as `self`.
        while changes.changed().await.is_ok() {
            if let Err(reason) = self.check().await {
                return reason;
            }
        }
        std::future::pending().await
    }
}
