//! A message of the port broker to the host.

#![no_main]

landfall_fuzz::broker_message!(ToHost);
