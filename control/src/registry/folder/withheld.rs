//! Lists the files of a folder that have no effect, for `status`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Approvals, settings};
use crate::model::registration::Registration;
use crate::model::trust::FolderFile;

/// One file of a folder that has no effect, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Withheld {
    /// The folder, every link resolved.
    pub folder: PathBuf,
    /// The file in it, by its path from there.
    pub file: String,
    /// The reason, without the file's name in front.
    pub reason: String,
    /// Whether `landfall trust FOLDER` is the way to change that.
    pub needs_trust: bool,
    /// Ports below 1024 that are not exposed for this reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// The files of a registration's folder that have no effect. Reads small files.
pub fn withheld(registration: &Registration, approvals: &Approvals) -> Vec<Withheld> {
    let settings = settings(registration, approvals).err();
    let ports = registration.folder_ports.as_ref().filter(|_| !registration.folder_ports_approved);
    if settings.is_none() && ports.is_none() {
        return Vec::new();
    }
    // A folder that is gone is named as it was registered.
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
