//! Creates new containers and removes them.

use std::collections::HashMap;

use super::models::{ContainerCreateBody, HostConfig, Mount, MountType, PortBinding};
use super::{
    ContainerActions, CreateContainerOptionsBuilder, DockerError, Engine, Error, NewContainer,
    StartContainerOptions, replace,
};
use crate::docker::rebuild::USER_LABEL;

/// The stop timeout of a container, in seconds. A dev server is the first process of its namespace and receives no signal
/// without a handler, so most use the whole timeout, and a restart is to be fast.
const STOP_SECONDS: i64 = 3;

/// The security option that keeps a process from gaining privileges by a set-uid program (`prctl(2)`,
/// `PR_SET_NO_NEW_PRIVS`).
const NO_NEW_PRIVILEGES: &str = "no-new-privileges";

impl Engine {
    /// Creates the container, starts it, and checks that it stays up. Removes it on failure.
    pub(in crate::docker) async fn run(&self, new: &NewContainer) -> Result<(), DockerError> {
        let name = new.name.as_str();
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let created = self.client.create_container(Some(options), body(new)).await;
        created.map_err(|error| self.refused(&error))?;
        let started = self.client.start_container(name, None::<StartContainerOptions>).await;
        let up = match started.map_err(|error| self.error(name, &error)) {
            Ok(()) => self.check_stays_up(name).await,
            Err(error) => Err(error),
        };
        if up.is_err() {
            // Otherwise its name would block the next attempt.
            let _ = self.remove(name).await;
        }
        up
    }

    /// Returns the labels of an image, which is pulled if the engine does not have it.
    pub(in crate::docker) async fn image_labels(
        &self,
        image: &str,
    ) -> Result<HashMap<String, String>, DockerError> {
        let inspected = match self.client.inspect_image(image).await {
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => {
                self.pull(image).await?;
                self.client.inspect_image(image).await
            }
            inspected => inspected,
        };
        let inspected = inspected.map_err(|error| self.refused(&error))?;
        Ok(inspected.config.and_then(|config| config.labels).unwrap_or_default())
    }

    /// Stops the container within its own timeout and removes it, with the rest of an interrupted replacement. Keeps
    /// volumes.
    pub(in crate::docker) async fn stop_and_remove(&self, name: &str) -> Result<bool, DockerError> {
        let aside = replace::aside_name(name);
        let mut was_there = false;
        for name in [name, &aside] {
            if self.inspect(name).await?.is_some() {
                was_there = true;
                self.stop(name).await?;
                self.remove(name).await?;
            }
        }
        Ok(was_there)
    }
}

fn body(new: &NewContainer) -> ContainerCreateBody {
    let inside = format!("{}/tcp", new.published);
    // Docker chooses a free host port if the request names none.
    let binding = PortBinding { host_ip: Some("127.0.0.1".to_owned()), host_port: Some(String::new()) };
    let folder = Mount {
        typ: Some(MountType::BIND),
        source: Some(new.folder.0.clone()),
        target: Some(new.folder.1.clone()),
        ..Mount::default()
    };
    let http = Mount {
        typ: Some(MountType::BIND),
        source: Some(new.http_directory.0.clone()),
        target: Some(new.http_directory.1.clone()),
        read_only: Some(true),
        ..Mount::default()
    };
    let mut labels: HashMap<String, String> = new.labels.clone().into_iter().collect();
    // The user is the image's.
    labels.insert(USER_LABEL.to_owned(), String::new());
    ContainerCreateBody {
        image: Some(new.image.clone()),
        env: Some(new.environment.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        exposed_ports: Some(vec![inside.clone()]),
        labels: Some(labels),
        stop_timeout: Some(STOP_SECONDS),
        host_config: Some(HostConfig {
            mounts: Some(vec![folder, http]),
            port_bindings: Some(HashMap::from([(inside, Some(vec![binding]))])),
            // A set-uid program of the image, which a rebuild may add, cannot make a process root.
            security_opt: Some(vec![NO_NEW_PRIVILEGES.to_owned()]),
            extra_hosts: Some(vec!["host.docker.internal:host-gateway".to_owned()]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}
