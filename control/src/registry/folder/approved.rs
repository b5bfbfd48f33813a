//! The permission to run a folder's commands, as a value: a [`Command`](super::Command) cannot be created without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use super::{Folder, FolderError, settings};
use crate::model::registration::Registration;
use crate::model::trust::{ContentDigest, FolderFile};
use crate::registry::trust_file::{NotTrusted, TrustFile};
use crate::sys::paths::Home;

/// The approvals of a home, with a notification of changes. Clones share the notification.
#[derive(Clone, Debug)]
pub struct Approvals {
    file: TrustFile,
    changed: Arc<watch::Sender<()>>,
}

impl Approvals {
    /// Returns the approvals of `home`.
    pub fn of(home: &Home) -> Approvals {
        Approvals { file: TrustFile::of(home), changed: Arc::new(watch::Sender::new(())) }
    }

    /// Returns the file of the approvals.
    pub fn file(&self) -> &TrustFile {
        &self.file
    }

    /// Makes each running command check its approval again.
    pub fn notify_changed(&self) {
        self.changed.send_replace(());
    }

    /// Calls [`settings`] on a blocking thread.
    ///
    /// # Errors
    /// The errors of [`settings`].
    pub async fn settings(&self, registration: &Arc<Registration>) -> Result<Approved, FolderError> {
        let (approvals, registration) = (self.clone(), Arc::clone(registration));
        let work = tokio::task::spawn_blocking(move || settings(&registration, &approvals));
        work.await.unwrap_or_else(|error| Err(FolderError::File(format!("was not read: {error}"))))
    }
}

/// The settings of a folder, approved when this value was created.
#[derive(Clone, Debug)]
pub struct Approved {
    settings: Folder,
    /// Absent for a folder without a file.
    basis: Option<Basis>,
}

/// The approved content.
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

    /// Returns the settings of a folder without a file.
    pub(super) fn empty() -> Approved {
        Approved { settings: Folder::default(), basis: None }
    }

    /// Returns the settings.
    pub fn settings(&self) -> &Folder {
        &self.settings
    }

    pub(super) fn basis(&self) -> Option<&Basis> {
        self.basis.as_ref()
    }
}

impl Basis {
    /// Returns the canonical folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the approved text.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Checks that the approval is still valid. Reads small files.
    pub(super) async fn check(&self) -> Result<(), NotTrusted> {
        let own = self.clone();
        let check = move || own.approvals.file.check(&own.folder, FolderFile::Settings, &own.content);
        // An error means that the runtime shuts down.
        tokio::task::spawn_blocking(check).await.unwrap_or(Err(NotTrusted::NotApproved))
    }

    /// Subscribes to later notifications, for [`Basis::revoked`].
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.approvals.changed.subscribe()
    }

    /// Returns when a notification arrives and the approval is no longer valid.
    pub(super) async fn revoked(&self, mut changes: watch::Receiver<()>) -> NotTrusted {
        // `self` holds the sender, so the channel stays open.
        while changes.changed().await.is_ok() {
            if let Err(reason) = self.check().await {
                return reason;
            }
        }
        std::future::pending().await
    }
}
