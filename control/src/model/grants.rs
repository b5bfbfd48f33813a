//! The rights that the host's user granted to a container, beyond acting for itself. Pure.
//!
//! A grant is a right and the folder that it was given for. It is in force while a container of its name is registered
//! with that folder; while the registration has another folder, the grant is dormant. So a right that was given to one
//! project does not pass to another project whose container has the same name.
//!
//! Grants are stored apart from registrations: registering a container again neither adds nor removes one. One right
//! comes with a registration instead: a client that registers without an attach method is a client of the reference,
//! whose users expect that their containers may rebuild themselves.
//!
//! A right of a newer build is kept in the file, and permits nothing in this build.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::model::registration::{ContainerName, Registration};

/// A right of a container beyond acting for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// The container may have its image built from its folder, and be recreated from that image.
    Rebuild,
}

/// A text that is not a right of this build.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown grant: {0}")]
pub struct RightError(pub String);

impl FromStr for Right {
    type Err = RightError;

    fn from_str(text: &str) -> Result<Right, RightError> {
        match text {
            "rebuild" => Ok(Right::Rebuild),
            _ => Err(RightError(text.to_owned())),
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Right::Rebuild => "rebuild",
        })
    }
}

/// The grants of one container name, as they are stored in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Grants {
    /// The name.
    pub container_name: ContainerName,
    /// The grants, in the order in which they were given.
    grants: Vec<Grant>,
    /// Fields of a newer build, kept as they were read.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// One grant. The right is kept as text, since it may be one of a newer build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Grant {
    what: String,
    folder: PathBuf,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

impl Grants {
    /// An empty set of grants.
    pub fn none(container_name: ContainerName) -> Grants {
        Grants { container_name, grants: Vec::new(), unknown: Map::new() }
    }

    /// Whether the file would hold no grant and no unknown field.
    pub fn is_empty(&self) -> bool {
        self.grants.is_empty() && self.unknown.is_empty()
    }

    /// Grants a right for a folder. Returns whether that is a change.
    pub fn grant(&mut self, right: Right, folder: &Path) -> bool {
        let is_new = !self.holds(right, folder);
        if is_new {
            let (what, folder) = (right.to_string(), folder.to_owned());
            self.grants.push(Grant { what, folder, unknown: Map::new() });
        }
        is_new
    }

    /// Revokes a right for every folder. Returns whether that is a change.
    ///
    /// # Errors
    /// [`RightError`] for a text that is neither a right of this build nor one of the grants.
    pub fn revoke(&mut self, what: &str) -> Result<bool, RightError> {
        let before = self.grants.len();
        self.grants.retain(|grant| grant.what != what);
        if self.grants.len() < before {
            return Ok(true);
        }
        what.parse::<Right>().map(|_| false)
    }

    /// Whether the right was granted for this folder.
    pub fn holds(&self, right: Right, folder: &Path) -> bool {
        let what = right.to_string();
        self.grants.iter().any(|grant| grant.what == what && grant.folder == folder)
    }
}

/// Whether a registered container has a right: by its registration, or by one of the grants of its name.
pub fn has_right(right: Right, registration: &Registration, grants: Option<&Grants>) -> bool {
    comes_with(right, registration) || grants.is_some_and(|grants| grants.holds(right, &registration.cwd))
}

/// Whether the registration itself carries the right.
pub fn comes_with(right: Right, registration: &Registration) -> bool {
    match right {
        Right::Rebuild => registration.attach_method.is_none(),
    }
}

/// One right of a registered container, for display.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrantFact {
    /// The right.
    pub what: String,
    /// Whether it is in force, and why.
    pub state: GrantState,
    /// The folder that it was granted for; absent for a right that comes with the registration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
}

/// See [`GrantFact`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GrantState {
    /// In force: the user granted it for the folder that is registered.
    Granted,
    /// In force: it comes with the registration of a client of the reference.
    Registered,
    /// Not in force: it was granted for another folder.
    Dormant,
    /// Not in force: it is a right of a newer build.
    Unknown,
}

impl GrantState {
    /// Whether the container has the right.
    pub fn is_in_force(self) -> bool {
        matches!(self, GrantState::Granted | GrantState::Registered)
    }
}

/// Every right of a registered container, in force or not.
pub fn facts(registration: &Registration, grants: Option<&Grants>) -> Vec<GrantFact> {
    let of_registration = [Right::Rebuild]
        .into_iter()
        .filter(|right| comes_with(*right, registration))
        .map(|right| GrantFact { what: right.to_string(), state: GrantState::Registered, folder: None });
    let granted = grants.into_iter().flat_map(|grants| &grants.grants).map(|grant| {
        let state = match (grant.what.parse::<Right>(), grant.folder == registration.cwd) {
            (Err(_), _) => GrantState::Unknown,
            (Ok(_), true) => GrantState::Granted,
            (Ok(_), false) => GrantState::Dormant,
        };
        GrantFact { what: grant.what.clone(), state, folder: Some(grant.folder.clone()) }
    });
    of_registration.chain(granted).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn grants(value: Value) -> Grants {
        serde_json::from_value(value).unwrap()
    }

    fn registration(cwd: &str, attach_method: Option<&str>) -> Registration {
        let fields = json!({"containerName": "shop", "cwd": cwd, "way": attach_method.map(|kind| json!({"kind": kind}))});
        Registration::from_fields(fields.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn unknown_right_is_an_error_that_names_it() {
        assert_eq!("rebuild".parse(), Ok(Right::Rebuild));
        for word in ["", "Rebuild", "rebuild ", "tool:claude", "host-bridge", "mesh"] {
            assert_eq!(word.parse::<Right>().unwrap_err().to_string(), format!("unknown grant: {word}"));
        }
    }

    #[test]
    fn grant_is_in_force_for_its_own_folder_only() {
        let mut own = Grants::none(ContainerName::new("shop").unwrap());
        assert!(own.grant(Right::Rebuild, Path::new("/a")) && !own.grant(Right::Rebuild, Path::new("/a")));
        for (cwd, expected) in [("/a", GrantState::Granted), ("/b", GrantState::Dormant)] {
            let registration = registration(cwd, Some("docker"));
            assert_eq!(has_right(Right::Rebuild, &registration, Some(&own)), expected.is_in_force());
            let folder = Some(PathBuf::from("/a"));
            let fact = GrantFact { what: "rebuild".to_owned(), state: expected, folder };
            assert_eq!(facts(&registration, Some(&own)), [fact]);
        }
        assert!(own.grant(Right::Rebuild, Path::new("/b")), "another folder is another grant");
        assert_eq!(own.revoke("rebuild"), Ok(true));
        assert!(own.is_empty(), "revoking takes the right away for every folder");
        assert_eq!(own.revoke("rebuild"), Ok(false));
        assert_eq!(own.revoke("tool:x"), Err(RightError("tool:x".to_owned())));
    }

    #[test]
    fn registration_without_an_attach_method_carries_the_right_to_rebuild() {
        assert!(has_right(Right::Rebuild, &registration("/a", None), None));
        assert!(!has_right(Right::Rebuild, &registration("/a", Some("docker")), None));
        assert!(!has_right(Right::Rebuild, &registration("/a", Some("websocket")), None));
        let fact = GrantFact { what: "rebuild".to_owned(), state: GrantState::Registered, folder: None };
        assert_eq!(facts(&registration("/a", None), None), [fact]);
    }

    #[test]
    fn grants_of_a_newer_build_are_kept_and_permit_nothing() {
        let text = json!({
            "containerName": "shop", "since": 1,
            "grants": [{"what": "tool:claude", "folder": "/a", "until": "2030"}, {"what": "rebuild", "folder": "/a"}],
        });
        let mut own = grants(text.clone());
        assert_eq!(serde_json::to_value(&own).unwrap(), text);
        assert_eq!(facts(&registration("/a", Some("docker")), Some(&own))[0].state, GrantState::Unknown);
        assert_eq!(own.revoke("rebuild"), Ok(true));
        assert!(!own.is_empty());
        assert_eq!(own.revoke("tool:claude"), Ok(true), "a grant that is there can be revoked");
        assert!(own.grants.is_empty() && !own.is_empty(), "a field of a newer build is kept");
    }
}
