//! `landfall stop`: stops, removes and deregisters a container that `landfall start` created.

use std::path::Path;

use serde_json::json;

use super::args::StopArgs;
use super::exit::{Exit, Failure};
use super::start::{self, docker_failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET};
use crate::docker::{self, Docker, FOLDER_LABEL, Listed};
use crate::model::registration::ContainerName;

/// Runs the verb.
pub fn stop(args: &StopArgs) -> Result<Exit, Failure> {
    let runtime = super::runtime()?;
    let docker = Docker::from_environment();
    let listed = runtime.block_on(docker.containers()).map_err(|error| docker_failure(&error))?;
    let name = which(args.what.as_deref(), &listed)?;
    let home = daemon_client::home()?;
    let client = Client::new(home.socket()).within(PATIENT_BUDGET);
    // The registration is removed first, since a container that is being stopped must not be forwarded (wire
    // specification, A.9). If no daemon runs, the next daemon removes the registration after it finds that the
    // container does not exist.
    match start::deregister(&client, &name) {
        Err(error) if !error.is_absent() => return Err(daemon_client::call_failure(&error)),
        _ => {}
    }
    runtime.block_on(docker.remove(&name)).map_err(|error| docker_failure(&error))?;
    // The directory was mounted only into this container. It is kept if it is not empty.
    let _ = std::fs::remove_dir(home.http_directory(&name));
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&json!({ "stopped": name }).to_string());
    } else {
        printer.line("stopped", Colour::Grey, &format!("{name}, and removed"));
    }
    Ok(Exit::Ok)
}

/// Finds the container by its name, or by the folder from which it was started.
fn which(what: Option<&str>, listed: &[Listed]) -> Result<ContainerName, Failure> {
    let named = what.and_then(|what| listed.iter().find(|listed| listed.name.as_str() == what));
    if let Some(named) = named {
        return match named.labels.own(FOLDER_LABEL).is_some() {
            true => Ok(named.name.clone()),
            false => Err(Failure::new(Exit::Refused, format!("{} was not started by landfall", named.name))
                .hint(format!(
                    "docker stop {name} stops it; landfall ls shows whether it is forwarded",
                    name = named.name
                ))),
        };
    }
    if let Some(what) = what.filter(|what| !Path::new(what).is_dir()) {
        return Err(Failure::new(Exit::Missing, format!("no container and no folder is named {what}"))
            .hint("docker ps -a lists the containers"));
    }
    let folder = start::folder(what.map(Path::new))?;
    // While a container is being replaced, two containers have the folder's label.
    let of_folder = |listed: &&Listed| {
        listed.labels.own(FOLDER_LABEL) == Some(&folder.text) && !docker::is_aside(&listed.name)
    };
    let mut of_folder = listed.iter().filter(of_folder);
    match (of_folder.next(), of_folder.next()) {
        (Some(only), None) => Ok(only.name.clone()),
        (None, _) => Err(Failure::new(
            Exit::Missing,
            format!("no container was started from the folder {}", folder.text),
        )
        .hint("landfall ls shows what is registered")),
        (Some(one), Some(other)) => Err(Failure::new(
            Exit::Usage,
            format!("several containers were started from {}: {}, {}, …", folder.text, one.name, other.name),
        )
        .hint("name one of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::docker::Network;
    use crate::docker::labels::{ContainerLabels, ImageLabels};
    use std::collections::BTreeMap;

    fn listed(name: &str, folder: Option<&str>) -> Listed {
        let labels = folder.map(|folder| (FOLDER_LABEL.to_owned(), folder.to_owned()));
        Listed {
            id: name.to_owned(),
            name: ContainerName::new(name).unwrap(),
            is_between_names: false,
            image: "x".to_owned(),
            created: 0,
            running: true,
            labels: ContainerLabels::new(labels.into_iter().collect(), ImageLabels::Known(BTreeMap::new())),
            network: Network::Own,
            published: BTreeMap::new(),
        }
    }

    #[test]
    fn only_containers_started_by_landfall_are_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        let path = path.to_str().unwrap();
        let all = [
            listed("shop", Some(path)),
            listed("shop.landfall-old", Some(path)),
            listed("db", None),
            listed("other", Some("/else")),
        ];
        let name = |what: Option<&str>| which(what, &all).map(|name| name.to_string());
        assert_eq!(name(Some("shop")).unwrap(), "shop");
        assert_eq!(name(Some(path)).unwrap(), "shop");
        assert_eq!(name(Some("other")).unwrap(), "other");
        assert_eq!(name(Some("db")).unwrap_err().message, "db was not started by landfall");
        let none = name(Some("nobody")).unwrap_err();
        assert_eq!(
            (none.exit, none.message.as_str()),
            (Exit::Missing, "no container and no folder is named nobody")
        );
        assert!(name(None).unwrap_err().message.starts_with("no container was started from the folder"));
        let twice = [listed("shop", Some(path)), listed("shop-2", Some(path))];
        assert!(which(Some(path), &twice).unwrap_err().message.contains("shop, shop-2"));
    }
}
