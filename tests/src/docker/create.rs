//! Containers created over the API, and engine settings that affect them.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::request::parameter;
use super::{FakeDocker, Reply};

impl FakeDocker {
    /// Makes every later start fail with this message, or succeed again.
    pub fn fail_starts(&self, message: Option<&str>) {
        self.state().start_error = message.map(str::to_owned);
    }

    /// Sets the gateway address of the network `bridge`.
    pub fn set_gateway(&self, gateway: IpAddr) {
        self.state().gateway = Some(gateway);
    }

    /// Returns the request that created a container, if it was created over the API.
    pub fn create_request(&self, name: &str) -> Option<Value> {
        self.state()
            .containers
            .get(name)
            .map(|container| container.create_request.clone())
            .filter(|create_request| !create_request.is_null())
    }

    pub(super) fn create(&self, query: &str, body: &[u8]) -> Reply {
        let Some(name) = parameter(query, "name") else {
            return Reply::Json(400, json!({"message": "no name"}));
        };
        if self.name_of(&name).is_some() {
            return Reply::Json(409, json!({"message": "the name is in use"}));
        }
        self.add(&name, false);
        let create_request: Value = serde_json::from_slice(body).unwrap_or_default();
        let mut state = self.state();
        let container = state.containers.get_mut(&name).unwrap();
        container.image = create_request["Image"].as_str().unwrap_or_default().to_owned();
        container.create_request = create_request;
        Reply::Json(201, json!({"Id": container.id, "Warnings": []}))
    }
}
