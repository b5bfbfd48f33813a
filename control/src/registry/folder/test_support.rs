//! A home with approvals, for tests of this crate.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tempfile::TempDir;

use super::{Approvals, FILE, seal};
use crate::model::registration::Registration;
use crate::model::trust::{ContentDigest, FolderFile};
use crate::sys::paths::Home;

/// A temporary home.
pub(crate) struct TestHome {
    directory: TempDir,
    pub(crate) approvals: Approvals,
}

impl TestHome {
    pub(crate) fn new() -> TestHome {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("home")).unwrap();
        home.ensure_directories().unwrap();
        TestHome { directory, approvals: Approvals::of(&home) }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Approves the present content of the folder's file.
    pub(crate) fn approve(&self, folder: &Path) {
        let content = std::fs::read(folder.join(FILE)).unwrap();
        let digest = ContentDigest::of(&content);
        let folder = folder.canonicalize().unwrap().to_str().unwrap().to_owned();
        let file = self.approvals.file();
        file.update(|trust| trust.approve(&folder, FolderFile::Settings, digest, "t".to_owned())).unwrap();
    }

    /// Writes the folder's file, approves it, and returns the registration `coder` with its settings.
    pub(crate) fn register(&self, folder: &Path, text: &str) -> Arc<Registration> {
        std::fs::write(folder.join(FILE), text).unwrap();
        let fields = json!({"containerName": "coder", "cwd": folder});
        let mut registration = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
        self.approve(folder);
        seal(&mut registration, self.approvals.file());
        Arc::new(registration)
    }

    pub(crate) fn revoke(&self, folder: &Path) {
        let folder = folder.canonicalize().unwrap().to_str().unwrap().to_owned();
        assert!(self.approvals.file().update(|trust| trust.revoke(&folder)).unwrap().value);
        self.approvals.notify_changed();
    }
}
