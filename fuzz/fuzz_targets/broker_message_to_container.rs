//! A message of the port broker to the container.

#![no_main]

landfall_fuzz::broker_message!(ToContainer);
