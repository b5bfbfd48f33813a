//! Lists the files of a folder that have no effect, for `status`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Approvals, settings};
use crate::model::registration::Registration;
use crate::model::trust::FolderFile;

/// A file of a folder that has no effect, in whole or in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Withheld {
    /// The folder, with all links resolved.
    pub folder: PathBuf,
    /// The path of the file relative to the folder.
    pub file: String,
    /// The reason, without the file name as its prefix.
    pub reason: String,
    /// Whether `landfall trust FOLDER` would change that.
    pub needs_trust: bool,
    /// Ports below 1024 that are not exposed for this reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// Returns the files of a registration's folder that have no effect. Reads small files.
pub fn withheld(registration: &Registration, approvals: &Approvals) -> Vec<Withheld> {
    let settings = settings(registration, approvals).err();
    let ports = registration.folder_ports.as_ref().filter(|_| !registration.folder_ports_approved);
    if settings.is_none() && ports.is_none() {
        return Vec::new();
    }
    // If the folder is gone, use the path of the registration.
    let folder = registration.cwd.canonicalize().unwrap_or_else(|_| registration.cwd.clone());
    let settings = settings.map(|error| Withheld {
        folder: folder.clone(),
        file: FolderFile::Settings.to_string(),
        needs_trust: error.is_not_trusted(),
        reason: super::reason_of(error),
        ports: Vec::new(),
    });
    let ports = ports.map(|ports| Withheld {
        folder: folder.clone(),
        file: ports.file.to_string(),
        needs_trust: true,
        reason: "is not trusted".to_owned(),
        ports: ports.privileged.iter().map(|port| port.get()).collect(),
    });
    settings.into_iter().chain(ports).collect()
}
